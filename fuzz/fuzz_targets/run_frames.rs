//! What a client of `POST /run` or `POST /functions/NAME/exec` sends: whatever is taken for a frame is one, byte for byte where it has no JSON.
#![no_main]

use bytes::BytesMut;
use funtainer_gateway::api::frames::{FRAME_BYTES_MAX, Frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = BytesMut::from(bytes);
    let mut before = rest.clone();
    while let Ok(Some(frame)) = Frame::decode(&mut rest) {
        let taken = before.split_to(before.len() - rest.len());
        match &frame {
            Frame::Stdin(bytes) | Frame::Stdout(bytes) | Frame::Stderr(bytes) => {
                assert!(bytes.len() <= FRAME_BYTES_MAX);
                assert_eq!(frame.encode(), taken);
            }
            Frame::StdinEnd | Frame::Begun | Frame::Resize(_) | Frame::Signal(_) => assert_eq!(frame.encode(), taken),
            Frame::Progress(_) | Frame::End(_) => {
                let mut again = BytesMut::from(&frame.encode()[..]);
                assert_eq!(Frame::decode(&mut again).unwrap().unwrap(), frame);
            }
        }
    }
});
