//! The probe of KVM on the host that runs this, whatever kind of host that is.
//!
//! There are three kinds: without KVM, with one that works, and with one that opens but cannot run a
//! kernel. The KVM lab is the first, then the second, and says so in `SMOLVM_TEST_KVM`; of other hosts
//! the kind is told by what is known of them besides.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use smolvm_vmm::probe::{Verdict, kvm};

/// What the probe promises to take at most.
const BOUND: Duration = Duration::from_secs(6);

/// Held by each test: they count what is the process's.
static TURNS: Mutex<()> = Mutex::new(());

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Absent,
    Works,
    /// Opens, and has no help of the processor.
    SoftwareOnly,
    /// Nothing is known of it but that the device opens.
    Opens,
}

fn kind() -> Kind {
    let told = std::env::var("SMOLVM_TEST_KVM").ok();
    match told.as_deref() {
        Some("absent") => Kind::Absent,
        Some("works") => Kind::Works,
        Some(other) => panic!("SMOLVM_TEST_KVM={other} is no kind of host"),
        None if !opens() => Kind::Absent,
        None if Path::new("/sys/module/kvm_pvm").exists() => Kind::SoftwareOnly,
        None => Kind::Opens,
    }
}

fn opens() -> bool {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

#[test]
fn each_kind_of_host_is_told_from_the_others() {
    let _turn = TURNS.lock();
    let (kind, verdict) = (kind(), kvm());
    assert_eq!(opens(), kind != Kind::Absent);
    match (kind, &verdict) {
        (Kind::Absent, Verdict::Absent { why }) => {
            assert!(why.starts_with("/dev/kvm "), "{why}");
        }
        (Kind::Works, Verdict::Works) => {}
        (Kind::SoftwareOnly, Verdict::Broken { why }) => {
            assert!(why.starts_with("/dev/kvm opens, but "), "{why}");
            assert!(why.contains("kvm_pvm"), "{why}");
        }
        (Kind::Opens, Verdict::Works | Verdict::Broken { .. }) => {
            // Which of two kinds it is, nobody told this test. So it tells, past the harness.
            let saw = format!("this host's KVM: {verdict:?}\n");
            let _ = std::io::stderr().write_all(saw.as_bytes());
        }
        _ => panic!("{kind:?}: {verdict:?}"),
    }
    assert_eq!(kvm(), verdict, "the second verdict is another");
}

#[test]
fn a_verdict_takes_no_longer_than_promised_and_leaves_no_descriptor() {
    let _turn = TURNS.lock();
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("a list").count();
    let before = descriptors();
    let begun = Instant::now();
    let verdict = kvm();
    assert!(begun.elapsed() < BOUND, "{verdict:?}");
    assert_eq!(descriptors(), before);
}
