//! Archives that were made to break a reader.

use std::io::BufReader;
use std::os::unix::fs::FileExt;

use funtainer_image::erofs::{EntryReason, WriteError, WriteOptions, write};
use funtainer_image::tar::{EXTENSION_BYTES_MAX, Reader, TarReason};
use proptest::prelude::*;

use crate::make::{Archive, Header, image, pax_record, try_write};

/// What a reader says of an archive: the number of entries, or the reason why not.
fn read(archive: &[u8]) -> Result<usize, TarReason> {
    let mut reader = Reader::new(archive);
    let mut count = 0;
    loop {
        match reader.next_entry() {
            Ok(None) => return Ok(count),
            Ok(Some(_)) => count += 1,
            Err(error) => {
                assert!(error.offset <= archive.len() as u64, "the place lies in the archive");
                return Err(error.reason);
            }
        }
        loop {
            match reader.next_chunk() {
                Ok(None) => break,
                Ok(Some(chunk)) => assert!(!chunk.bytes.is_empty()),
                Err(error) => return Err(error.reason),
            }
        }
    }
}

fn everything() -> Archive {
    let gnu = |name: &[u8], typeflag| {
        let mut header = Header::new(name, typeflag, 4);
        header.put(257, b"ustar  \0");
        header
    };
    let mut sparse = gnu(b"old-sparse", b'S');
    sparse.octal(386, 12, 100).octal(398, 12, 4).octal(483, 12, 200);
    Archive::new()
        .entry(b"global", b'g', &pax_record(b"path", b"ignored"))
        .directory("d")
        .file("d/f", &[1; 700])
        .pax(&[(b"path", &[b'n'; 250]), (b"SCHILY.xattr.user.x", b"a\nb")])
        .file("short", &[2; 10])
        .entry(b"././@LongLink", b'L', &[&[b'l'; 150][..], &[0]].concat())
        .entry(b"././@LongLink", b'K', &[&[b't'; 120][..], &[0]].concat())
        .symlink("short", "short")
        .header(&sparse)
        .data(b"data")
        .pax(&[(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")])
        .file("new-sparse", &[&b"1\n5\n4\n"[..], &[0; 506], b"data"].concat())
        .hard_link("h", "d/f")
        .entry(b"p", b'6', b"")
}

#[test]
fn truncation_anywhere_is_seen() {
    let archive = everything().0;
    let entries = read(&everything().end()).unwrap();
    assert_eq!(entries, 8);
    assert_eq!(read(&archive).unwrap(), entries, "the end needs no blocks of zeros");
    for end in 0..archive.len() {
        let cut = &archive[..end];
        match read(cut) {
            Ok(count) => assert!(count < entries && end % 512 == 0, "cut at {end}"),
            Err(TarReason::Truncated) => {}
            Err(TarReason::ExtensionWithoutEntry) => assert_eq!(end % 512, 0, "cut at {end}"),
            Err(other) => panic!("cut at {end}: {other}"),
        }
        let _ = try_write(cut);
    }
}

#[test]
fn how_the_input_comes_in_makes_no_difference() {
    let archive = everything().end();
    let expect = image(&archive);
    for size in (1..100).chain([511, 512, 513, 1_000]) {
        let input = BufReader::with_capacity(size, archive.as_slice());
        let out = tempfile::tempfile().unwrap();
        let summary = write(&mut Reader::new(input), &out, WriteOptions::default()).unwrap();
        let mut bytes = vec![0; summary.image_bytes as usize];
        out.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expect, "{size} bytes at once");
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let file = || Header::new(b"f", b'0', 0);
    let check = |header: &Header, expect: &str| {
        let reason = read(&Archive::new().header(header).end()).expect_err(expect);
        assert_eq!(reason.to_string(), expect);
    };
    check(file().put(124, &[0xff; 12]), "the size is out of range");
    check(file().put(124, b"-0000000001\0"), "the size of the header is no number");
    check(file().put(124, b"00000000009\0"), "the size of the header is no number");
    check(
        file().put(124, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        "the size of the header is no number",
    );
    check(file().put(124, b"77777777777\0"), "the archive ends too early");
    check(file().put(124, &[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), "the archive ends too early");
    check(file().put(108, &[0xff; 8]), "the user id is out of range");
    check(file().put(108, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), "the user id is out of range");
    check(file().put(116, &[0x80, 0, 0, 1, 0, 0, 0, 0]), "the group id is out of range");
    check(file().put(100, &[0xff; 8]), "the mode is out of range");
    check(file().put(136, b"later\0\0\0\0\0\0\0"), "the time of the header is no number");
    check(file().put(156, b"M"), "entries of type 0x4d are not supported");
    check(file().put(156, b"?"), "entries of type 0x3f are not supported");
    check(Header::new(b"d", b'3', 0).put(329, &[0xff; 8]), "the device number is out of range");
    let mut broken = Archive::new().header(&file());
    broken.0[0] ^= 1;
    assert_eq!(read(&broken.end()).unwrap_err().to_string(), "the checksum of the header is wrong");
    assert_eq!(read(&[b'x'; 512]).unwrap_err().to_string(), "the checksum of the header is no number");
    let lone = Archive::new().file("f", b"").data(&[0; 512]).file("g", b"");
    assert_eq!(read(&lone.end()).unwrap_err().to_string(), "a header follows a block of zeros");
    assert!(
        read(&Archive::new().header(Header::new(b"f", b'0', 0).put(136, &[0xff; 12])).end()).is_ok(),
        "times can be negative"
    );
}

#[test]
fn extended_headers_that_lie_are_refused() {
    let check = |archive: Archive, expect: &str| {
        assert_eq!(read(&archive.end()).expect_err(expect).to_string(), expect);
    };
    let pax = |records: &[(&[u8], &[u8])]| Archive::new().pax(records).file("f", b"");
    check(Archive::new().entry(b"x", b'x', b"5 a=b").file("f", b""), "a record of the PAX header is malformed");
    check(Archive::new().entry(b"x", b'x', b"999 a=b\n").file("f", b""), "a record of the PAX header is malformed");
    check(pax(&[(b"path", b"a\0b")]), "a path contains a NUL byte");
    check(pax(&[(b"path", &[b'p'; 4_096])]), "a path of 4096 bytes; at most 4095 are allowed");
    check(pax(&[(b"size", b"-1")]), "the PAX record size has a value that cannot be");
    check(pax(&[(b"size", b"9223372036854775808")]), "the PAX record size has a value that cannot be");
    check(pax(&[(b"size", b"9223372036854775807")]), "the archive ends too early");
    check(pax(&[(b"uid", b"4294967295")]), "the PAX record uid has a value that cannot be");
    check(pax(&[(b"mtime", b"now")]), "the PAX record mtime has a value that cannot be");
    check(pax(&[(b"SCHILY.xattr.", b"")]), "the PAX record SCHILY.xattr has a value that cannot be");
    check(Archive::new().pax(&[(b"path", b"f")]), "an extended header has no entry after it");
    check(Archive::new().entry(b"x", b'L', b"name"), "an extended header has no entry after it");
    let bomb = Header::new(b"x", b'x', EXTENSION_BYTES_MAX + 1);
    check(Archive::new().header(&bomb), "an extended header of 1048577 bytes; at most 1048576 are allowed");
    let bomb = Header::new(b"x", b'L', 1 << 32);
    check(Archive::new().header(&bomb), "an extended header of 4294967296 bytes; at most 1048576 are allowed");
    check(Archive::new().header(&Header::new(b"x", b'g', 1 << 32)), "the archive ends too early");
    // Many attributes are no bomb for the reader, but for the layer.
    let value = vec![0; 60_000];
    let names: Vec<_> = (0..15).map(|index| format!("SCHILY.xattr.user.{index}")).collect();
    let records: Vec<(&[u8], &[u8])> = names.iter().map(|name| (name.as_bytes(), value.as_slice())).collect();
    let error = try_write(&pax(&records).end()).unwrap_err();
    assert!(matches!(error, WriteError::Entry { reason: EntryReason::XattrTotal, .. }), "{error}");
    // A thousand extended headers before one entry: the last counts, and none stays in memory.
    let chain = (0..1_000).fold(Archive::new(), |archive, index| archive.pax(&[(b"path", format!("n{index}").as_bytes())]));
    assert_eq!(read(&chain.file("f", b"").end()).unwrap(), 1);
}

#[test]
fn maps_of_sparse_files_that_lie_are_refused() {
    let pax = |map: &str, size: &str, data: &[u8]| {
        let records: [(&[u8], &[u8]); 2] = [(b"GNU.sparse.size", size.as_bytes()), (b"GNU.sparse.map", map.as_bytes())];
        read(&Archive::new().pax(&records).file("f", data).end()).map_err(|reason| reason.to_string())
    };
    let wrong = |what: &str| Err(format!("the map of a sparse file is wrong: {what}"));
    assert_eq!(pax("0,2,4,2", "10", b"data"), Ok(1));
    assert_eq!(pax("0,2,4,2,10,0", "10", b"data"), Ok(1));
    assert_eq!(pax("0,3,2,1", "10", b"data"), wrong("pieces overlap or are out of order"));
    assert_eq!(pax("4,2,0,2", "10", b"data"), wrong("pieces overlap or are out of order"));
    assert_eq!(pax("0,2,9,2", "10", b"data"), wrong("a piece lies behind the end of the file"));
    assert_eq!(pax("0,9223372036854775807", "10", b"data"), wrong("a piece lies behind the end of the file"));
    assert_eq!(
        pax("9223372036854775807,9223372036854775807", "9223372036854775807", b""),
        wrong("a piece lies behind the end of the file")
    );
    assert_eq!(pax("0,2", "10", b"data"), wrong("the pieces are not as long as the content"));
    assert_eq!(pax("0,2,4,3", "10", b"data"), wrong("the pieces are not as long as the content"));
    let value = || Err("the PAX record GNU.sparse has a value that cannot be".to_owned());
    assert_eq!(pax("0,2,4", "10", b"data"), value());
    assert_eq!(pax("0,-2", "10", b"data"), value());
    assert_eq!(pax("0,2,4,2", "9223372036854775808", b"data"), value());
    assert_eq!(pax("", "10", b"data"), value());

    let version_1 = |content: &[u8]| {
        let records: [(&[u8], &[u8]); 3] =
            [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"99")];
        read(&Archive::new().pax(&records).file("f", content).end()).map_err(|reason| reason.to_string())
    };
    let block = |text: &str| {
        let mut block = text.as_bytes().to_vec();
        block.resize(512, 0);
        block
    };
    assert_eq!(version_1(&block("0\n")), Ok(1));
    assert_eq!(version_1(b"0\n"), wrong("the map is longer than the content"));
    assert_eq!(version_1(&block("1\n")), wrong("a line is no number"));
    assert_eq!(version_1(&block("x\n")), wrong("a line is no number"));
    assert_eq!(version_1(&block("99999999999999999999\n")), wrong("a line is no number"));
    assert_eq!(version_1(&[b'1'; 512]), wrong("a line is no number"));
    assert_eq!(version_1(&block("1048577\n")), Err("a sparse file has more than 1048576 pieces".to_owned()));
    let endless = "1000000\n".to_owned() + &"0\n0\n".repeat(126);
    assert_eq!(version_1(endless.as_bytes()), wrong("the map is longer than the content"));

    let gnu = |pairs: &[(u64, u64)], size: u64, continues: u8| {
        let mut header = Header::new(b"f", b'S', 4);
        header.put(257, b"ustar  \0").octal(483, 12, size).put(482, &[continues]);
        for (index, (offset, length)) in pairs.iter().enumerate() {
            header.octal(386 + index * 24, 12, *offset).octal(398 + index * 24, 12, *length);
        }
        read(&Archive::new().header(&header).data(&[b'x'; 512]).end()).map_err(|reason| reason.to_string())
    };
    assert_eq!(gnu(&[(0, 2), (8, 2)], 10, 0), Ok(1));
    assert_eq!(gnu(&[(8, 2), (0, 2)], 10, 0), wrong("pieces overlap or are out of order"));
    assert_eq!(gnu(&[(0, 2), (9, 2)], 10, 0), wrong("a piece lies behind the end of the file"));
    assert_eq!(gnu(&[(0, 2)], 10, 0), wrong("the pieces are not as long as the content"));
    assert_eq!(gnu(&[], 10, 0), wrong("the pieces are not as long as the content"));
    assert_eq!(gnu(&[(0, 2), (8, 2)], 10, 1), wrong("a field is no number"));
}

#[test]
fn sizes_that_no_disk_holds_are_refused_before_they_are_written() {
    let holes = |size: &str| {
        let records: [(&[u8], &[u8]); 2] = [(b"GNU.sparse.size", size.as_bytes()), (b"GNU.sparse.numblocks", b"0")];
        try_write(&Archive::new().pax(&records).file("f", b"").end())
    };
    assert!(holes("1000000000").is_ok());
    let error = holes("9223372036854775807").unwrap_err();
    assert!(matches!(error, WriteError::Entry { reason: EntryReason::ImageTooLarge, offset: 1024, .. }), "{error}");
    let twice = Archive::new().pax(&[(b"GNU.sparse.size", b"600000000000")]).file("a", b"");
    let twice = twice.append(&Archive::new().pax(&[(b"GNU.sparse.size", b"600000000000")]).file("b", b""));
    let error = try_write(&twice.end()).unwrap_err();
    assert_eq!(error.to_string(), "entry 'b' at byte 2560 of the tar cannot be part of a layer");
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "the layer needs more than 268435456 blocks");
}

#[test]
fn many_entries_are_refused() {
    // One entry with 2,000 parents, again and again: inodes count, not entries alone.
    let mut archive = Archive::new();
    for index in 0..600 {
        let path = format!("{index}/{}", "d/".repeat(1_900));
        archive = archive.pax(&[(b"path", path.as_bytes())]).file("", b"");
    }
    let error = try_write(&archive.end()).unwrap_err();
    assert!(matches!(error, WriteError::Entry { reason: EntryReason::TooMany, .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn damage_is_an_error_and_no_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), seal in any::<bool>()) {
        let mut archive = everything().end();
        for (index, byte) in flips {
            let at = index.index(archive.len());
            archive[at] = byte;
            if seal {
                // With a right checksum, the damage gets further.
                let start = at / 512 * 512;
                let block = Header(archive[start..start + 512].try_into().unwrap()).sealed();
                archive[start..start + 512].copy_from_slice(&block);
            }
        }
        let _ = read(&archive);
        let _ = try_write(&archive);
    }

    #[test]
    fn noise_is_an_error_and_no_panic(noise in prop::collection::vec(any::<u8>(), 0..2_000)) {
        let _ = read(&noise);
    }
}
