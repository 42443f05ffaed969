//! What is measured on the host once after each start of it: whether its hypervisor works, and how
//! fast its time-stamp counter runs.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader};

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
    // Each measures a little different, and templates are told apart by it: all go by one.
    let measured = tsc::khz();
    let settled = store.put_host_fact(TSC_KHZ, &boot, &measured.to_string())?;
    Ok(settled.parse().unwrap_or(measured))
}

/// The host's processor as a guest may have seen it: its model and stepping, and a hash of what else
/// tells it from others, its features above all.
pub(crate) fn cpu() -> Result<String> {
    let failed = |error| crate::error::io("could not read /proc/cpuinfo", error);
    let file = std::fs::File::open("/proc/cpuinfo").map_err(failed)?;
    let mut first = String::new();
    // The first processor is enough, and reading no further spares the kernel the others.
    for line in BufReader::new(file).lines() {
        let line = line.map_err(failed)?;
        if line.is_empty() {
            break;
        }
        first.push_str(&line);
        first.push('\n');
    }
    Ok(cpu_in(&first))
}

/// See [`cpu`]. Pure.
fn cpu_in(cpuinfo: &str) -> String {
    let field = |wanted: &str| {
        cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim_end() == wanted)
            .map_or("", |(_, value)| value.trim())
    };
    let identity = ["vendor_id", "cpu family", "model", "stepping", "flags"].map(field);
    let mut hasher = DefaultHasher::new();
    identity.hash(&mut hasher);
    format!(
        "{}, stepping {}, {:016x}",
        field("model name"),
        field("stepping"),
        hasher.finish()
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_differ_by_model_stepping_and_features_and_not_by_speed() {
        let cpuinfo = |model: &str, stepping: &str, mhz: &str, flags: &str| {
            format!(
                "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
                 model name\t: {model}\nstepping\t: {stepping}\ncpu MHz\t\t: {mhz}\n\
                 flags\t\t: {flags}\n"
            )
        };
        let one = cpu_in(&cpuinfo("Xeon", "7", "2500.1", "fpu sse2 avx2"));
        assert!(one.starts_with("Xeon, stepping 7, "), "{one}");
        assert_eq!(
            one,
            cpu_in(&cpuinfo("Xeon", "7", "3100.9", "fpu sse2 avx2"))
        );
        assert_ne!(one, cpu_in(&cpuinfo("Xeon", "7", "2500.1", "fpu sse2")));
        assert_ne!(
            one,
            cpu_in(&cpuinfo("Xeon", "6", "2500.1", "fpu sse2 avx2"))
        );
        assert_ne!(
            one,
            cpu_in(&cpuinfo("Xeon 2", "7", "2500.1", "fpu sse2 avx2"))
        );
        assert!(!cpu().expect("this host has one").is_empty());
    }
}
