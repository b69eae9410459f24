//! Quantities as people write them: `512M`, `1.5G` and `300s`, `10m`, `250ms`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest duration that can be set: a year, so that sums of two never overflow a timer.
const DURATION_MAX: Duration = Duration::from_hours(8760);

/// A number of bytes. Text form: a number and a suffix `K`, `M`, `G` or `T` (powers of 1024; `Ki`, `KiB`, `kb` mean the same), or bytes without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(u64);

/// Why a text is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// No number with a known suffix.
    #[error("'{0}' is no size: write a number with K, M, G or T, such as 512M")]
    Size(String),
    /// No number with a known unit.
    #[error("'{0}' is no duration: write a number with ms, s, m, h or d, such as 30s")]
    Duration(String),
    /// Does not fit.
    #[error("'{0}' is too large")]
    TooLarge(String),
}

impl ByteSize {
    /// So many bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many times 2^20 bytes.
    pub const fn mebibytes(mebibytes: u32) -> Self {
        Self((mebibytes as u64) << 20)
    }

    /// The number of bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let wrong = || QuantityError::Size(text.to_owned());
        let (number, suffix) = split_number(text);
        let shift = match suffix.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "ki" | "kb" | "kib" => 10,
            "m" | "mi" | "mb" | "mib" => 20,
            "g" | "gi" | "gb" | "gib" => 30,
            "t" | "ti" | "tb" | "tib" => 40,
            _ => return Err(wrong()),
        };
        let micro = parse_micro(number).ok_or_else(wrong)?;
        let bytes = (micro << shift) / MICRO;
        u64::try_from(bytes).map(Self).map_err(|_| QuantityError::TooLarge(text.to_owned()))
    }
}

/// The shortest exact form: `512M`, `1536M`, `1000`.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Reads `250ms`, `30s`, `1.5m`, `2h`, `1d`, or whole seconds without unit.
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let wrong = || QuantityError::Duration(text.to_owned());
    let (number, unit) = split_number(text);
    let unit_micros: u128 = match unit {
        "us" => 1,
        "ms" => 1_000,
        "" | "s" => 1_000_000,
        "m" | "min" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return Err(wrong()),
    };
    let micros = parse_micro(number).ok_or_else(wrong)? * unit_micros / MICRO;
    let duration = u64::try_from(micros).map_or(Duration::MAX, Duration::from_micros);
    if duration > DURATION_MAX { Err(QuantityError::TooLarge(text.to_owned())) } else { Ok(duration) }
}

/// The largest unit in which `duration` is a whole number: `300s` is `5m`.
pub fn format_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    for (unit_micros, unit) in [(86_400_000_000, "d"), (3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"), (1_000, "ms")]
    {
        if micros >= unit_micros && micros.is_multiple_of(unit_micros) {
            return format!("{}{unit}", micros / unit_micros);
        }
    }
    if micros == 0 { "0s".to_owned() } else { format!("{micros}us") }
}

const MICRO: u128 = 1_000_000;

fn split_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    text.split_at(end)
}

/// A decimal number in millionths. At most 20 digits before and 6 after the point.
fn parse_micro(number: &str) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 6 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let whole: u128 = whole.parse().ok()?;
    let fraction: u128 = format!("{fraction:0<6}").parse().ok()?;
    Some(whole * MICRO + fraction)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes() {
        let check = |text: &str, expect: u64| assert_eq!(text.parse::<ByteSize>().unwrap().as_bytes(), expect, "{text}");
        check("512M", 512 << 20);
        check("512MiB", 512 << 20);
        check("1.5G", 1536 << 20);
        check("0", 0);
        check("4096", 4096);
        for bad in ["", "M", "-1", "1.", "1..2", "1X", "99999999999999999999T", "1 M"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert_eq!(ByteSize::mebibytes(1536).to_string(), "1536M");
    }

    #[test]
    fn durations() {
        let check =
            |text: &str, millis: u64| assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        check("250ms", 250);
        check("30s", 30_000);
        check("30", 30_000);
        check("1.5m", 90_000);
        check("10m", 600_000);
        for bad in ["", "s", "-1s", "1y", "366d", "1e3"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert_eq!(format_duration(Duration::from_mins(5)), "5m");
    }

    proptest! {
        #[test]
        fn forms_round_trip(bytes: u64, millis in 0_u64..1_000_000_000) {
            prop_assert_eq!(ByteSize::bytes(bytes).to_string().parse::<ByteSize>().unwrap().as_bytes(), bytes);
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&format_duration(duration)).unwrap(), duration);
        }
    }
}
