//! What is measured on the host once after each start of it: whether its hypervisor works, and how
//! fast its time-stamp counter runs.

use smolvm_host::process::boot_id;
use smolvm_vmm::probe::{self, Verdict};
use smolvm_vmm::tsc;

use crate::config::AccelChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;

const KVM: &str = "kvm";
const TSC_KHZ: &str = "tsc-khz";

/// How guest instructions run on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceleration {
    /// Whether hardware virtualization is used; emulation otherwise.
    pub kvm: bool,
    /// Why.
    pub reason: String,
}

/// Decides how guest instructions run.
pub(crate) fn acceleration(store: &mut Store, choice: AccelChoice) -> Result<Acceleration> {
    if choice == AccelChoice::Emulation {
        return Ok(Acceleration {
            kvm: false,
            reason: "it was asked for".to_owned(),
        });
    }
    let (works, reason) = kvm(store)?;
    if choice == AccelChoice::Kvm && !works {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "hardware virtualization was asked for and does not work here",
        )
        .because(reason)
        .hint("leave --accel out to use emulation, or run `smolvm doctor`"));
    }
    Ok(Acceleration { kvm: works, reason })
}

/// Whether KVM works, and why or why not.
fn kvm(store: &mut Store) -> Result<(bool, String)> {
    let boot = boot_id()?;
    // Only verdicts that hold until the next boot are remembered. A device that is not there, or
    // that this user may not open, may be given at any time, and looking again costs next to nothing.
    if let Some(known) = store.host_fact(KVM, &boot)? {
        let probed_by_me = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        if probed_by_me && let Some((word, reason)) = known.split_once(' ') {
            return Ok((word == "works", reason.to_owned()));
        }
    }
    match probe::kvm() {
        Verdict::Works => {
            let reason = "a probe ran guest code in /dev/kvm".to_owned();
            store.put_host_fact(KVM, &boot, &format!("works {reason}"))?;
            Ok((true, reason))
        }
        Verdict::Broken { why } => {
            store.put_host_fact(KVM, &boot, &format!("broken {why}"))?;
            Ok((false, why))
        }
        Verdict::Absent { why } => Ok((false, why)),
    }
}

/// The frequency of the time-stamp counter in kHz.
///
/// Guests under emulation see the host's counter and have no other clock to measure it by.
pub(crate) fn tsc_khz(store: &mut Store) -> Result<u64> {
    let boot = boot_id()?;
    if let Some(known) = store.host_fact(TSC_KHZ, &boot)?
        && let Ok(khz) = known.parse()
    {
        return Ok(khz);
    }
    let khz = tsc::khz();
    store.put_host_fact(TSC_KHZ, &boot, &khz.to_string())?;
    Ok(khz)
}

/// As [`acceleration`], with nothing remembered: for checks that must not write.
pub(crate) fn look(choice: AccelChoice) -> Result<Acceleration> {
    if choice == AccelChoice::Emulation {
        return Ok(Acceleration {
            kvm: false,
            reason: "it was asked for".to_owned(),
        });
    }
    Ok(match probe::kvm() {
        Verdict::Works => Acceleration {
            kvm: true,
            reason: "a probe ran guest code in /dev/kvm".to_owned(),
        },
        Verdict::Broken { why } | Verdict::Absent { why } => Acceleration {
            kvm: false,
            reason: why,
        },
    })
}
