//! The records of a PAX extended header: `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record. Values are bytes:
//! they may hold newlines and NULs, so that a record ends by its length alone.

use super::{FILE_BYTES_MAX, ID_MAX, TarReason, Timestamp, Xattr, sparse};

/// Prefix of the keys that carry extended attributes (star, GNU tar, Go, libarchive).
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What the records say that a layer needs; all other keys are ignored, as the standard wants.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) sparse: sparse::Records,
}

impl Records {
    pub(super) fn parse(mut text: &[u8]) -> Result<Self, TarReason> {
        let mut records = Self::default();
        while !text.is_empty() {
            let (key, value, rest) = record(text).ok_or(TarReason::Pax)?;
            records.add(key, value)?;
            text = rest;
        }
        Ok(records)
    }

    /// Takes in one record. An empty value takes an earlier one back.
    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarReason> {
        let some = (!value.is_empty()).then_some(value);
        match key {
            b"path" => self.path = some.map(<[u8]>::to_vec),
            b"linkpath" => self.linkpath = some.map(<[u8]>::to_vec),
            b"size" => self.size = parse(some, size, "size")?,
            b"uid" => self.uid = parse(some, id, "uid")?,
            b"gid" => self.gid = parse(some, id, "gid")?,
            b"mtime" => self.mtime = parse(some, time, "mtime")?,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    if name.is_empty() || name.contains(&0) {
                        return Err(TarReason::PaxValue("SCHILY.xattr"));
                    }
                    self.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.add(key, value)?;
                }
            }
        }
        Ok(())
    }
}

/// Splits the first record off.
fn record(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = text.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&text[..space])?).ok()?;
    let (record, rest) = text.split_at_checked(length)?;
    let pair = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (&pair[..equals], &pair[equals + 1..], rest))
}

fn parse<T>(value: Option<&[u8]>, parse: fn(&[u8]) -> Option<T>, key: &'static str) -> Result<Option<T>, TarReason> {
    value.map(|value| parse(value).ok_or(TarReason::PaxValue(key))).transpose()
}

/// Digits only, no sign, no space.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

pub(super) fn size(text: &[u8]) -> Option<u64> {
    decimal(text).filter(|size| *size <= FILE_BYTES_MAX)
}

fn id(text: &[u8]) -> Option<u32> {
    decimal(text).and_then(|id| u32::try_from(id).ok()).filter(|id| *id <= ID_MAX)
}

/// `[-]SECONDS[.FRACTION]`; digits after the ninth are dropped, towards the past.
fn time(text: &[u8]) -> Option<Timestamp> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let digits = fraction.iter().map(|byte| u32::from(byte - b'0')).chain(std::iter::repeat(0));
    let mut nanoseconds = digits.take(9).fold(0, |value, digit| value * 10 + digit);
    if !negative {
        return Some(Timestamp { seconds, nanoseconds });
    }
    if fraction.iter().skip(9).any(|byte| *byte != b'0') {
        nanoseconds += 1;
    }
    Some(match nanoseconds {
        0 => Timestamp { seconds: -seconds, nanoseconds: 0 },
        _ => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_end_by_their_length_alone() {
        let records = Records::parse(b"29 SCHILY.xattr.user.x=a\n=\0b\n12 path=a\nb\n9 size=7\n").unwrap();
        assert_eq!(records.xattrs, [Xattr { name: b"user.x".to_vec(), value: b"a\n=\0b".to_vec() }]);
        assert_eq!(records.path.as_deref(), Some(&b"a\nb"[..]));
        assert_eq!(records.size, Some(7));
    }

    #[test]
    fn an_empty_value_takes_an_earlier_one_back() {
        let records = Records::parse(b"9 size=7\n8 size=\n").unwrap();
        assert_eq!(records.size, None);
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"x path=a\n"[..],
            b"9 path=a",
            b"9 path=a\n\0",
            b"0 path=a\n",
            b"1 path=a\n",
            b"2 path=a\n",
            b"99999999999999999999 path=a\n",
            b"18446744073709551615 path=a\n",
            b"-9 path=a\n",
            b"5 =a\n",
            b"7 patha\n",
            b" 9 path=a\n",
            b"9 uid=-1\n",
            b"18 uid=4294967295\n",
            b"28 size=9223372036854775808\n",
            b"11 mtime=.\n",
            b"12 mtime=1e\n",
        ] {
            assert!(Records::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_round_towards_the_past() {
        let check = |text: &[u8], expect: Option<(i64, u32)>| {
            let expect = expect.map(|(seconds, nanoseconds)| Timestamp { seconds, nanoseconds });
            assert_eq!(time(text), expect, "{}", text.escape_ascii());
        };
        check(b"0", Some((0, 0)));
        check(b"1.5", Some((1, 500_000_000)));
        check(b"1.0000000019", Some((1, 1)));
        check(b"1.", Some((1, 0)));
        check(b"-1", Some((-1, 0)));
        check(b"-1.5", Some((-2, 500_000_000)));
        check(b"-0.0000000001", Some((-1, 999_999_999)));
        check(b"-0.9999999999", Some((-1, 0)));
        check(b"9223372036854775807", Some((i64::MAX, 0)));
        check(b"9223372036854775808", None);
        check(b".5", None);
        check(b"1.x", None);
        check(b"+1", None);
    }
}
