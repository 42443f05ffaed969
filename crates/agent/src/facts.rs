//! The guest's state, for the host's tables.

use rustix::time::{ClockId, Timespec};
use smolvm_proto::message::{Event, Facts, Failure};

use crate::failure::{from_errno, from_io};
use crate::stream::Last;

/// Flag of a kernel thread in field 9 of /proc/PID/stat (linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;

/// Collects the state.
pub(crate) fn facts() -> Result<Last, Failure> {
    let system = rustix::system::sysinfo();
    let unit = u64::from(system.mem_unit);
    let disk = rustix::fs::statvfs("/")
        .map_err(|errno| from_errno("asking the root file system for its size", errno))?;
    let meminfo = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| from_io("reading /proc/meminfo", &error))?;
    Ok(Last {
        channels: &[],
        event: Event::Facts(Facts {
            uptime_ms: milliseconds(rustix::time::clock_gettime(ClockId::Boottime)),
            memory_total: system.totalram * unit,
            memory_available: available(&meminfo).unwrap_or_else(|| system.freeram * unit),
            load_milli: system.loads.map(load_milli),
            processes: processes(),
            disk_total: disk.f_blocks * disk.f_frsize,
            disk_free: disk.f_bfree * disk.f_frsize,
            wall_clock_ns: nanoseconds(rustix::time::clock_gettime(ClockId::Realtime)),
        }),
    })
}

/// Whole milliseconds of a time that is not negative.
pub(crate) fn milliseconds(time: Timespec) -> u64 {
    nanoseconds(time) / 1_000_000
}

fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// sysinfo(2) gives loads in units of 1/65536.
fn load_milli(load: u64) -> u32 {
    u32::try_from(u128::from(load) * 1000 / 65_536).unwrap_or(u32::MAX)
}

/// `MemAvailable` in bytes (proc(5)).
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn processes() -> u32 {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return 0;
    };
    let count = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/stat"))
                .is_ok_and(|stat| !is_kernel_thread(&stat))
        })
        .count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn is_kernel_thread(stat: &str) -> bool {
    // The second field is a name in parentheses that may hold anything, parentheses included.
    stat.rsplit_once(") ")
        .and_then(|(_, fields)| fields.split(' ').nth(6)?.parse::<u64>().ok())
        .is_some_and(|flags| flags & PF_KTHREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_threads_are_told_apart_by_their_flags() {
        assert!(is_kernel_thread("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"));
        assert!(!is_kernel_thread("1 (a) b) S 0 1 1 0 -1 4194560 0 0"));
        assert!(!is_kernel_thread(""));
    }

    #[test]
    fn numbers_of_the_kernel_are_converted() {
        assert_eq!(
            available("MemTotal: 1 kB\nMemAvailable:     12 kB\n"),
            Some(12 * 1024)
        );
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert_eq!(load_milli(65_536 + 32_768), 1500);
        assert_eq!(
            milliseconds(Timespec {
                tv_sec: 2,
                tv_nsec: 3_999_999
            }),
            2003
        );
    }
}
