//! Whatever an image has for passwd and group, a user that is accepted has ids that a sandbox maps.
#![no_main]

use funtainer_contract::accounts::{GROUPS_MAX, ID_MAX, resolve};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &[u8], &[u8])| {
    let (user, passwd, group) = input;
    if let Ok(identity) = resolve(user, passwd, group) {
        let ids = [identity.uid, identity.gid];
        assert!(ids.iter().chain(&identity.groups).all(|id| u64::from(*id) <= ID_MAX));
        assert!(identity.groups.len() <= GROUPS_MAX && identity.groups.is_sorted());
        assert!(identity.home.starts_with('/') && !identity.home.contains('\0'));
    }
});
