//! The line that `ls -l` would print, which clients show as it is.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use crate::users;

/// Seconds after which a date is shown with its year and without its time, as ls(1) does.
const RECENT_S: i64 = 183 * 24 * 3600;

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// Names of users and groups, by number.
#[derive(Debug, Default)]
pub(super) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Reads the guest's files.
    pub(super) fn read() -> Self {
        Self {
            users: users::user_names().into_iter().collect(),
            groups: users::group_names().into_iter().collect(),
        }
    }
}

/// The line of one file.
pub(super) fn line(name: &[u8], metadata: &Metadata, names: &Names, now: i64) -> Vec<u8> {
    let known = |names: &HashMap<u32, String>, id: u32| {
        names.get(&id).cloned().unwrap_or_else(|| id.to_string())
    };
    let mut line = format!(
        "{} {:3} {:<8} {:<8} {:8} {} ",
        mode(metadata.mode()),
        metadata.nlink(),
        known(&names.users, metadata.uid()),
        known(&names.groups, metadata.gid()),
        metadata.size(),
        date(metadata.mtime(), now),
    )
    .into_bytes();
    line.extend_from_slice(name);
    line
}

/// A mode as ls(1) shows it.
fn mode(mode: u32) -> String {
    let kind = match mode & 0o170_000 {
        0o040_000 => 'd',
        0o120_000 => 'l',
        0o020_000 => 'c',
        0o060_000 => 'b',
        0o010_000 => 'p',
        0o140_000 => 's',
        _ => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, marks) in [
        (6, 0o4000, ['s', 'S']),
        (3, 0o2000, ['s', 'S']),
        (0, 0o1000, ['t', 'T']),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => marks[0],
            (true, false) => marks[1],
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// A time as ls(1) shows it, in UTC.
fn date(time: i64, now: i64) -> String {
    let (days, second) = (time.div_euclid(86_400), time.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let month = MONTHS[month];
    if time > now || now - time > RECENT_S {
        format!("{month} {day:2}  {year:4}")
    } else {
        format!(
            "{month} {day:2} {:02}:{:02}",
            second / 3600,
            second / 60 % 60
        )
    }
}

/// Year, month from 0 and day from 1 of a day counted from 1970-01-01: counted in eras of 400 years
/// that begin in March, so that the leap day is the last of a year.
fn civil(days: i64) -> (i64, usize, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day = days.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = (month + 2) % 12;
    let year = era * 400 + year + i64::from(month < 2);
    (year, usize::try_from(month).unwrap_or(0), day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_shown_as_ls_shows_them() {
        for (bits, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o041_777, "drwxrwxrwt"),
            (0o104_755, "-rwsr-xr-x"),
            (0o104_644, "-rwSr--r--"),
            (0o102_711, "-rwx--s--x"),
            (0o120_777, "lrwxrwxrwx"),
            (0o020_620, "crw--w----"),
        ] {
            assert_eq!(mode(bits), text);
        }
    }

    #[test]
    fn dates_are_shown_as_ls_shows_them() {
        let now = 1_700_000_000; // 2023-11-14T22:13:20Z
        for (time, text) in [
            (now, "Nov 14 22:13"),
            (now - 3600, "Nov 14 21:13"),
            (now + 1, "Nov 14  2023"),
            (0, "Jan  1  1970"),
            (951_782_400, "Feb 29  2000"),
            (951_868_800, "Mar  1  2000"),
            (-1, "Dec 31  1969"),
            (4_107_542_399, "Feb 28  2100"),
        ] {
            assert_eq!(date(time, now), text, "{time}");
        }
    }
}
