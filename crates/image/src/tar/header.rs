//! The header block of an entry.

use super::{BLOCK_BYTES, DeviceNumber, FILE_BYTES_MAX, ID_MAX, TarReason, Timestamp};

/// A header with a right checksum. Offsets: POSIX.1-2017 `pax`, "ustar Header Block".
pub(super) struct Header<'a> {
    block: &'a [u8; BLOCK_BYTES],
    pub(super) typeflag: Typeflag,
    magic: Magic,
}

/// The kind of an entry, as the header has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Typeflag {
    File,
    HardLink,
    Symlink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
    Pax,
    PaxGlobal,
    GnuLongName,
    GnuLongLink,
    GnuSparse,
    /// A directory of an incremental archive; its content lists names.
    GnuDirectory,
    VolumeLabel,
    Other(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Magic {
    V7,
    Ustar,
    /// ustar whose prefix is shorter, for two more times.
    Star,
    Gnu,
}

impl Typeflag {
    fn new(byte: u8) -> Self {
        match byte {
            // '7' is a contiguous file: the difference means nothing today.
            0 | b'0' | b'7' => Self::File,
            b'1' => Self::HardLink,
            b'2' => Self::Symlink,
            b'3' => Self::CharacterDevice,
            b'4' => Self::BlockDevice,
            b'5' => Self::Directory,
            b'6' => Self::Fifo,
            // 'X' is what Solaris wrote before there was a standard.
            b'x' | b'X' => Self::Pax,
            b'g' => Self::PaxGlobal,
            b'L' => Self::GnuLongName,
            b'K' => Self::GnuLongLink,
            b'S' => Self::GnuSparse,
            b'D' => Self::GnuDirectory,
            b'V' => Self::VolumeLabel,
            other => Self::Other(other),
        }
    }

    /// Whether content can follow. Types 1 to 6 have none, whatever their size says.
    pub(super) fn has_content(self) -> bool {
        !matches!(
            self,
            Self::HardLink | Self::Symlink | Self::CharacterDevice | Self::BlockDevice | Self::Directory | Self::Fifo
        )
    }
}

impl<'a> Header<'a> {
    pub(super) fn parse(block: &'a [u8; BLOCK_BYTES]) -> Result<Self, TarReason> {
        let stored = number(&block[148..156]).ok_or(TarReason::Number("checksum"))?;
        if stored != checksum(block, i64::from) && stored != checksum(block, |byte| i64::from(byte as i8)) {
            return Err(TarReason::Checksum);
        }
        let magic = match &block[257..265] {
            b"ustar  \0" => Magic::Gnu,
            m if m.starts_with(b"ustar\0") && &block[508..512] == b"tar\0" => Magic::Star,
            m if m.starts_with(b"ustar\0") => Magic::Ustar,
            _ => Magic::V7,
        };
        Ok(Self { block, typeflag: Typeflag::new(block[156]), magic })
    }

    /// The name with its prefix.
    pub(super) fn path(&self) -> Vec<u8> {
        let prefix = match self.magic {
            Magic::Ustar => text(&self.block[345..500]),
            Magic::Star => text(&self.block[345..476]),
            Magic::V7 | Magic::Gnu => b"",
        };
        let name = text(&self.block[..100]);
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.block[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u16, TarReason> {
        let mode = number(&self.block[100..108]).ok_or(TarReason::Number("mode"))?;
        let mode = u64::try_from(mode).map_err(|_| TarReason::Range("mode"))?;
        // Some writers put the file's type in front.
        Ok((mode & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<u32, TarReason> {
        id(&self.block[108..116], "user id")
    }

    pub(super) fn gid(&self) -> Result<u32, TarReason> {
        id(&self.block[116..124], "group id")
    }

    pub(super) fn size(&self) -> Result<u64, TarReason> {
        let size = number(&self.block[124..136]).ok_or(TarReason::Number("size"))?;
        u64::try_from(size).ok().filter(|size| *size <= FILE_BYTES_MAX).ok_or(TarReason::Range("size"))
    }

    pub(super) fn mtime(&self) -> Result<Timestamp, TarReason> {
        let seconds = number(&self.block[136..148]).ok_or(TarReason::Number("time"))?;
        Ok(Timestamp { seconds, nanoseconds: 0 })
    }

    pub(super) fn device(&self) -> Result<DeviceNumber, TarReason> {
        if self.magic == Magic::V7 {
            return Ok(DeviceNumber { major: 0, minor: 0 });
        }
        let part = |field: &[u8]| {
            let value = number(field).ok_or(TarReason::Number("device number"))?;
            u32::try_from(value).map_err(|_| TarReason::Range("device number"))
        };
        Ok(DeviceNumber { major: part(&self.block[329..337])?, minor: part(&self.block[337..345])? })
    }
}

/// A number of a header: octal digits between spaces and NULs, or base-256 where the first bit is set. `None` where the
/// field is neither, or does not fit.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // Big-endian two's complement, whose first bit is the mark and whose second is the sign.
    let negative = first & 0x40 != 0;
    let mut value: i64 = if negative { -1 } else { 0 };
    for (index, byte) in field.iter().enumerate() {
        let byte = match (index, negative) {
            (0, false) => byte & 0x7f,
            _ => *byte,
        };
        // Shifting out anything but the sign would lose it.
        if value >> 55 != if negative { -1 } else { 0 } {
            return None;
        }
        value = (value << 8) | i64::from(byte);
    }
    Some(value)
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !blank(byte)) else { return Some(0) };
    let field = text(&field[start..]);
    let digits = field.trim_ascii_end();
    digits.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

fn id(field: &[u8], what: &'static str) -> Result<u32, TarReason> {
    let value = number(field).ok_or(TarReason::Number(what))?;
    u32::try_from(value).ok().filter(|id| *id <= ID_MAX).ok_or(TarReason::Range(what))
}

/// The sum over the block, its own field taken as spaces. Old writers summed signed bytes.
fn checksum(block: &[u8; BLOCK_BYTES], value: impl Fn(u8) -> i64) -> i64 {
    let sum = |part: &[u8]| part.iter().map(|byte| value(*byte)).sum::<i64>();
    sum(&block[..148]) + 8 * i64::from(b' ') + sum(&block[156..])
}

/// A text field: up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        let check = |field: &[u8], expect| assert_eq!(number(field), expect, "{field:?}");
        check(b"0000644\0", Some(0o644));
        check(b"   644 \0", Some(0o644));
        check(b"00644\0xx", Some(0o644));
        check(b"77777777", Some(0o7777_7777));
        check(b"\0\0\0\0\0\0\0\0", Some(0));
        check(b"        ", Some(0));
        check(b"0000648\0", None);
        check(b"-000001\0", None);
        check(b"6 4     ", None);
        check(&[0x80, 0, 0, 0, 0, 0, 1, 0], Some(256));
        check(&[0xff; 8], Some(-1));
        check(&[0xff; 12], Some(-1));
        check(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00], Some(-256));
        check(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Some(i64::MAX));
        check(&[0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0], None);
        check(&[0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0], Some(i64::MIN));
        check(&[0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0], None);
        check(&[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], None);
    }
}
