//! The frequency of the host's time-stamp counter.
//!
//! An emulated guest sees the host's counter as its own, and on the `microvm` machine has nothing to
//! measure it by, so it must be told.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::thread::sleep;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::sys::read_tsc;

/// Points at which counter and clock are read together.
const POINTS: usize = 9;

/// From one point to the next. Frequencies are taken over half of all points, 16 ms, against which
/// a read that is wrong by 100 ns is 6 millionths.
const STEP: Duration = Duration::from_millis(4);

/// Reads for one point; the quickest one counts.
const READS: usize = 16;

/// How far what the processor says of itself may be from what was measured: the frequency a
/// hypervisor passes on unchanged, although it scales the counter, is further off than any crystal.
const TOLERANCE: f64 = 0.001;

/// The frequency in kHz.
///
/// Blocks the thread for some 35 ms. What the processor or the hypervisor states is preferred, as
/// it does not vary from one call to the next, and stands if a measurement does not contradict it.
#[must_use]
pub fn khz() -> u64 {
    let measured = calibrate();
    match stated() {
        Some(stated) if (stated as f64 / measured as f64 - 1.0).abs() < TOLERANCE => stated,
        _ => measured,
    }
}

/// Measures against the clock that nobody disciplines: clock_gettime(2), `CLOCK_MONOTONIC_RAW`.
fn calibrate() -> u64 {
    let mut points = [read_point(); POINTS];
    for point in &mut points[1..] {
        sleep(STEP);
        *point = read_point();
    }
    from_points(&points)
}

/// A counter value and the time in nanoseconds at which it was read.
#[derive(Debug, Clone, Copy)]
struct Point {
    ticks: u64,
    ns: i128,
}

/// Reads both. The clock is read on either side of the counter, and of several tries the one with
/// the least time between is kept: the others were interrupted.
fn read_point() -> Point {
    let try_once = || {
        let before = now_ns();
        let ticks = read_tsc();
        let after = now_ns();
        let ns = i128::midpoint(before, after);
        (after - before, Point { ticks, ns })
    };
    let mut best = try_once();
    for _ in 1..READS {
        let next = try_once();
        if next.0 < best.0 {
            best = next;
        }
    }
    best.1
}

fn now_ns() -> i128 {
    let now = clock_gettime(ClockId::MonotonicRaw);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// The median of the frequencies between points that lie half of all points apart. One bad point
/// spoils at most two of them.
fn from_points(points: &[Point]) -> u64 {
    let half = points.len() / 2;
    let mut frequencies: Vec<u64> = points
        .iter()
        .zip(&points[half..])
        .map(|(from, to)| {
            let ticks = i128::from(to.ticks.wrapping_sub(from.ticks));
            let ns = (to.ns - from.ns).max(1);
            u64::try_from((ticks * 1_000_000 + ns / 2) / ns).unwrap_or(u64::MAX)
        })
        .collect();
    frequencies.sort_unstable();
    frequencies[frequencies.len() / 2]
}

/// What the processor (CPUID leaf 0x15) or the hypervisor above it (leaf 0x40000010, in kHz,
/// defined by VMware and given by several) states. Most state nothing.
fn stated() -> Option<u64> {
    let under_hypervisor = __cpuid(1).ecx & 1 << 31 != 0;
    if under_hypervisor && (0x4000_0010..0x4001_0000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = __cpuid(0x4000_0010).eax;
        if khz != 0 {
            return Some(u64::from(khz));
        }
    }
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid_count(0x15, 0);
    crystal_khz(leaf.eax, leaf.ebx, leaf.ecx)
}

/// Intel SDM volume 2, CPUID leaf 0x15: the counter runs at `ecx` Hz times `ebx / eax`. Any of them
/// may be 0 for "not stated". Leaf 0x16 is of no help: it gives the rounded number of the brochure.
fn crystal_khz(eax: u32, ebx: u32, ecx: u32) -> Option<u64> {
    let hz = (u64::from(ecx) * u64::from(ebx)).checked_div(u64::from(eax))?;
    let khz = (hz + 500) / 1000;
    (khz != 0).then_some(khz)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_calibrations_agree() {
        let (one, other) = (calibrate(), calibrate());
        let apart = (one as f64 / other as f64 - 1.0).abs();
        assert!(apart < 0.0005, "{one} and {other} kHz are {apart} apart");
        assert!((100_000..10_000_000).contains(&one), "{one} kHz");
    }

    #[test]
    fn what_is_reported_is_what_is_measured() {
        let (reported, measured) = (khz(), calibrate());
        let apart = (reported as f64 / measured as f64 - 1.0).abs();
        assert!(apart < 2.0 * TOLERANCE, "{reported} and {measured} kHz");
    }

    #[test]
    fn one_bad_point_does_not_count() {
        let mut points: Vec<Point> = (0..9)
            .map(|i| Point {
                ticks: i * 12_000_000,
                ns: i128::from(i) * 4_000_000,
            })
            .collect();
        assert_eq!(from_points(&points), 3_000_000);
        for bad in 0..points.len() {
            let good = points[bad];
            points[bad].ns += 1_000_000;
            assert_eq!(from_points(&points), 3_000_000, "point {bad}");
            points[bad] = good;
        }
    }

    #[test]
    fn the_counter_may_wrap() {
        let points = [
            Point {
                ticks: u64::MAX - 5_999_999,
                ns: 0,
            },
            Point {
                ticks: 6_000_000,
                ns: 4_000_000,
            },
        ];
        assert_eq!(from_points(&points), 3_000_000);
    }

    #[test]
    fn a_crystal_gives_the_rate_if_all_is_stated() {
        assert_eq!(crystal_khz(2, 168, 24_000_000), Some(2_016_000));
        assert_eq!(crystal_khz(0, 168, 24_000_000), None);
        assert_eq!(crystal_khz(2, 168, 0), None);
        assert_eq!(crystal_khz(2, 0, 24_000_000), None);
    }
}
