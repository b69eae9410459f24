//! Maps of sparse files: GNU tar manual, "Storing Sparse Files".

use super::{BLOCK_BYTES, FILE_BYTES_MAX, SPARSE_SEGMENTS_MAX, TarReason, header, pax};

/// A piece of a file that is stored; all else of the file is holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// What the `GNU.sparse.*` records of a PAX header say.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) name: Option<Vec<u8>>,
    /// Size of the file with its holes.
    pub(super) size: Option<u64>,
    /// The map of the forms 0.0 and 0.1.
    pub(super) map: Vec<Segment>,
    has_map: bool,
    /// An offset of form 0.0 that waits for its length.
    offset: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
}

impl Records {
    /// Takes in the record `GNU.sparse.KEY`.
    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarReason> {
        let wrong = || TarReason::PaxValue("GNU.sparse");
        let number = || pax::size(value).ok_or_else(wrong);
        match key {
            b"name" => self.name = (!value.is_empty()).then(|| value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"offset" => {
                let waiting = self.offset.replace(number()?);
                if waiting.is_some() {
                    return Err(wrong());
                }
            }
            b"numbytes" => {
                let offset = self.offset.take().ok_or_else(wrong)?;
                self.push(offset, number()?)?;
            }
            b"map" => {
                let mut numbers = value.split(|byte| *byte == b',').map(pax::size);
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().flatten();
                    self.push(offset.ok_or_else(wrong)?, length.ok_or_else(wrong)?)?;
                }
            }
            // `numblocks` says what the map says.
            _ => {}
        }
        Ok(())
    }

    pub(super) fn is_version_1(&self) -> bool {
        self.major == Some(1) && self.minor == Some(0)
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.has_map || self.size.is_some()
    }

    fn push(&mut self, offset: u64, length: u64) -> Result<(), TarReason> {
        self.has_map = true;
        push(&mut self.map, offset, length)
    }
}

/// The map of the old GNU form.
#[derive(Debug)]
pub(super) struct GnuMap {
    pub(super) segments: Vec<Segment>,
    pub(super) size: u64,
    /// Whether another block of the map follows.
    pub(super) continues: bool,
}

impl GnuMap {
    pub(super) fn from_header(block: &[u8; BLOCK_BYTES]) -> Result<Self, TarReason> {
        let size = number(&block[483..495])?;
        let mut map = Self { segments: Vec::new(), size, continues: block[482] != 0 };
        map.add(&block[386..482])?;
        Ok(map)
    }

    pub(super) fn extend(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<(), TarReason> {
        self.continues = block[504] != 0;
        self.add(&block[..504])
    }

    /// Takes in pairs of 12-byte numbers; an empty one ends the list.
    fn add(&mut self, pairs: &[u8]) -> Result<(), TarReason> {
        for pair in pairs.chunks_exact(24) {
            if pair[0] == 0 || pair[12] == 0 {
                break;
            }
            push(&mut self.segments, number(&pair[..12])?, number(&pair[12..])?)?;
        }
        Ok(())
    }
}

/// The map of the PAX form 1.0, line by line.
#[derive(Debug, Default)]
pub(super) struct TextMap {
    pub(super) segments: Vec<Segment>,
    /// Pieces to come; unknown before the first line.
    missing: Option<u64>,
    offset: Option<u64>,
    line: Vec<u8>,
}

impl TextMap {
    pub(super) fn is_complete(&self) -> bool {
        self.missing == Some(0)
    }

    /// Takes in a block; what follows the last line in it is padding.
    pub(super) fn feed(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<(), TarReason> {
        for byte in block {
            if self.is_complete() {
                break;
            }
            if *byte != b'\n' {
                // The longest number has 19 digits.
                if self.line.len() == 19 {
                    return Err(TarReason::Sparse("a line is no number"));
                }
                self.line.push(*byte);
                continue;
            }
            let value = pax::size(&self.line).ok_or(TarReason::Sparse("a line is no number"))?;
            self.line.clear();
            match (self.missing, self.offset.take()) {
                (None, _) if value > SPARSE_SEGMENTS_MAX as u64 => return Err(TarReason::SparseSegments),
                (None, _) => self.missing = Some(value),
                (Some(_), None) => self.offset = Some(value),
                (Some(missing), Some(offset)) => {
                    push(&mut self.segments, offset, value)?;
                    self.missing = Some(missing - 1);
                }
            }
        }
        Ok(())
    }
}

/// Checks that the pieces ascend without overlap, end inside the file, and are what is stored.
pub(super) fn check(segments: &[Segment], size: u64, stored: u64) -> Result<(), TarReason> {
    let mut end = 0;
    let mut sum = 0_u64;
    for segment in segments {
        if segment.offset < end {
            return Err(TarReason::Sparse("pieces overlap or are out of order"));
        }
        // Both are below 2^63.
        end = segment.offset + segment.length;
        if end > size {
            return Err(TarReason::Sparse("a piece lies behind the end of the file"));
        }
        sum += segment.length;
    }
    if sum != stored {
        return Err(TarReason::Sparse("the pieces are not as long as the content"));
    }
    Ok(())
}

fn push(segments: &mut Vec<Segment>, offset: u64, length: u64) -> Result<(), TarReason> {
    if segments.len() == SPARSE_SEGMENTS_MAX {
        return Err(TarReason::SparseSegments);
    }
    segments.push(Segment { offset, length });
    Ok(())
}

fn number(field: &[u8]) -> Result<u64, TarReason> {
    let wrong = TarReason::Sparse("a field is no number");
    header::number(field).and_then(|value| u64::try_from(value).ok()).filter(|value| *value <= FILE_BYTES_MAX).ok_or(wrong)
}
