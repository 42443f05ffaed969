//! Sizes, times and ages as people write and read them. Pure.

use std::time::Duration;

use smolvm_engine::CPUS_MAX;

const MIB: u64 = 1024 * 1024;

/// Parses a time: `30s`, `5m`, `1h30m`, `250ms`, `1.5s`; a bare number is seconds.
///
/// # Errors
///
/// A sentence that says what is accepted.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a time; write 30s, 5m, 1h30m or a number of seconds");
    if text.is_empty() {
        return Err(bad());
    }
    let mut total = 0.0_f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
        let tail = &rest[digits..];
        let unit = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let seconds = match &tail[..unit] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            // Only a number alone may leave its unit out: `1m30` is a slip, not 90 seconds.
            "" if rest.len() == text.len() => 1.0,
            _ => return Err(bad()),
        };
        total += number * seconds;
        rest = &tail[unit..];
    }
    Duration::try_from_secs_f64(total).map_err(|_| bad())
}

/// Like [`duration`], and refuses zero, which would end what it limits before it began.
///
/// # Errors
///
/// A sentence that says what is accepted.
pub(crate) fn limit(text: &str) -> Result<Duration, String> {
    let limit = duration(text)?;
    if limit.is_zero() {
        return Err("a limit of zero allows nothing; leave the flag out for no limit".to_owned());
    }
    Ok(limit)
}

/// Like [`limit`], for a time that has a default and is never without a limit.
///
/// # Errors
///
/// A sentence that says what is accepted.
pub(crate) fn boot_limit(text: &str) -> Result<Duration, String> {
    let limit = duration(text)?;
    if limit.is_zero() {
        return Err(
            "no guest boots in no time; leave the flag out for the default of 1m".to_owned(),
        );
    }
    Ok(limit)
}

/// Parses a number of CPUs. Whether a sandbox may have as many is the engine's to say; a number too
/// large for it is said in the same words.
///
/// # Errors
///
/// A sentence that says what is accepted.
pub(crate) fn cpus(text: &str) -> Result<u8, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a number of CPUs; write 1 to {CPUS_MAX}"))
}

/// Parses an amount of memory or disk into MiB: `512`, `512M`, `512MiB`, `4G`, `4GiB`; a bare number
/// is MiB.
///
/// # Errors
///
/// A sentence that says what is accepted.
pub(crate) fn mib(text: &str) -> Result<u32, String> {
    let bad = || format!("`{text}` is not a size; write 512, 512M or 4G (a bare number is MiB)");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| bad())?;
    let factor = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1024,
        "t" | "tb" | "tib" => 1024 * 1024,
        _ => return Err(bad()),
    };
    number
        .checked_mul(factor)
        .and_then(|mib| u32::try_from(mib).ok())
        .ok_or_else(|| format!("`{text}` is more than can be counted"))
}

/// Bytes for people: `0 B`, `640 KiB`, `1.5 GiB`.
pub(crate) fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths of the unit, in integers, so that no rounding of floats shows.
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    let (whole, tenth) = (tenths / 10, tenths % 10);
    if whole >= 100 || tenth == 0 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{tenth} {}", UNITS[unit])
    }
}

/// MiB for people.
pub(crate) fn show_mib(mib: u32) -> String {
    show_bytes(u64::from(mib) * MIB)
}

/// A time for people, in at most two units: `250ms`, `5s`, `1m 30s`, `2h`.
pub(crate) fn show_duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (day, hour, minute) = (86400, 3600, 60);
    let two = |big: u64, big_name: &str, small: u64, small_name: &str| {
        if small == 0 {
            format!("{big}{big_name}")
        } else {
            format!("{big}{big_name} {small}{small_name}")
        }
    };
    if seconds >= day {
        two(seconds / day, "d", seconds % day / hour, "h")
    } else if seconds >= hour {
        two(seconds / hour, "h", seconds % hour / minute, "m")
    } else if seconds >= minute {
        two(seconds / minute, "m", seconds % minute, "s")
    } else if time.subsec_millis() == 0 {
        format!("{seconds}s")
    } else if seconds > 0 {
        format!("{seconds}.{}s", time.subsec_millis() / 100)
    } else {
        format!("{}ms", time.subsec_millis())
    }
}

/// How long ago `then` was, in its largest unit; a clock that went backwards reads as `now`.
pub(crate) fn show_age(then: jiff::Timestamp, now: jiff::Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then.as_second());
    let (number, unit) = match seconds {
        ..1 => return "now".to_owned(),
        1..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {unit}{plural} ago")
}

/// Milliseconds, for figures, to the microsecond; more digits would be noise.
pub(crate) fn millis(time: Duration) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "2^52 microseconds are 142 years"
    )]
    let micros = time.as_micros() as f64;
    micros / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_refused_in_words_that_help() {
        let no_default = limit("0").expect_err("zero");
        assert!(no_default.contains("for no limit"), "{no_default}");
        let default = boot_limit("0").expect_err("zero");
        assert!(default.contains("the default of 1m"), "{default}");
        assert_eq!(boot_limit("2"), Ok(Duration::from_secs(2)));
        assert_eq!(cpus("4"), Ok(4));
        assert!(cpus("300").expect_err("too many").contains("1 to 32"));
    }

    #[test]
    fn durations() {
        let ms = |text| duration(text).map(|time| time.as_millis());
        assert_eq!(ms("30"), Ok(30_000));
        assert_eq!(ms("30s"), Ok(30_000));
        assert_eq!(ms("5m"), Ok(300_000));
        assert_eq!(ms("1h30m"), Ok(5_400_000));
        assert_eq!(ms("250ms"), Ok(250));
        assert_eq!(ms("1.5s"), Ok(1500));
        assert_eq!(ms("0"), Ok(0));
        for bad in [
            "",
            "s",
            "-1",
            "1x",
            "1m30",
            "1..2s",
            "1e9",
            " 1",
            "99999999999999999999d",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(limit("0").is_err());
        assert_eq!(limit("1"), Ok(Duration::from_secs(1)));
    }

    #[test]
    fn sizes() {
        assert_eq!(mib("512"), Ok(512));
        assert_eq!(mib("512M"), Ok(512));
        assert_eq!(mib("512mib"), Ok(512));
        assert_eq!(mib("1G"), Ok(1024));
        assert_eq!(mib("4gb"), Ok(4096));
        for bad in [
            "",
            "M",
            "-1",
            "1.5G",
            "1K",
            "1 G",
            "99999999999999999999",
            "9999999T",
        ] {
            assert!(mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown_sizes() {
        assert_eq!(show_bytes(0), "0 B");
        assert_eq!(show_bytes(1023), "1023 B");
        assert_eq!(show_bytes(1024), "1 KiB");
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(300 * MIB + 700_000), "300 MiB");
        assert_eq!(show_bytes(u64::MAX), "16383 PiB");
        assert_eq!(show_mib(512), "512 MiB");
        assert_eq!(show_mib(4096), "4 GiB");
    }

    #[test]
    fn shown_durations() {
        let show = |ms| show_duration(Duration::from_millis(ms));
        assert_eq!(show(0), "0s");
        assert_eq!(show(250), "250ms");
        assert_eq!(show(5000), "5s");
        assert_eq!(show(1500), "1.5s");
        assert_eq!(show(90_000), "1m 30s");
        assert_eq!(show(7_200_000), "2h");
        assert_eq!(show(90_000_000), "1d 1h");
    }

    #[test]
    fn ages() {
        let at = |second| jiff::Timestamp::from_second(second).expect("a time");
        assert_eq!(show_age(at(100), at(100)), "now");
        assert_eq!(show_age(at(100), at(50)), "now");
        assert_eq!(show_age(at(0), at(1)), "1 second ago");
        assert_eq!(show_age(at(0), at(7300)), "2 hours ago");
        assert_eq!(show_age(at(0), at(200_000)), "2 days ago");
    }
}
