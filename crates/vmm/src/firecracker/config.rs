//! What Firecracker is told at its start. Pure.
//!
//! A machine that boots is described by one file (`--config-file`): it boots before the first request
//! could be sent, and nine requests are spared. The words are those of the API's description.

use std::ffi::OsString;

use serde::Serialize;

use super::api::SOCKET;
use super::jail;
use super::run::{VSOCK, disk_name};
use crate::{Devices, DiskPlan, VmPlan};

/// The port of its host that the guest's agent connects to.
pub(super) const AGENT_PORT: u32 = 1024;

/// The number of the one network device.
pub(super) const NIC: &str = "eth0";

/// The guest's address on its vsock. Each machine has a socket of its own, so all have the same: the
/// first that is free (vsock(7)).
const GUEST_CID: u32 = 3;

/// Longest name of a machine, whose letters are those of ours but for `_`.
const ID_BYTES_MAX: usize = 64;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Config {
    boot_source: BootSource,
    drives: Vec<Drive>,
    machine_config: Machine,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    network_interfaces: Vec<Interface>,
    vsock: Vsock,
}

#[derive(Debug, Serialize)]
struct BootSource {
    kernel_image_path: String,
    initrd_path: String,
    boot_args: String,
}

#[derive(Debug, Serialize)]
struct Drive {
    drive_id: String,
    path_on_host: String,
    is_root_device: bool,
    is_read_only: bool,
    cache_type: &'static str,
}

#[derive(Debug, Serialize)]
struct Machine {
    vcpu_count: u8,
    mem_size_mib: u32,
}

#[derive(Debug, Serialize)]
struct Interface {
    iface_id: &'static str,
    host_dev_name: String,
    guest_mac: String,
}

#[derive(Debug, Serialize)]
struct Vsock {
    guest_cid: u32,
    uds_path: &'static str,
}

/// The machine of `plan`, whose network device is connected to the device `cable` of the host.
///
/// `None` if one of its paths is no UTF-8, which the file could not say.
pub(super) fn config(plan: &VmPlan, cable: Option<&str>) -> Option<Config> {
    let nic = plan.nic.as_ref().zip(cable);
    let (kernel, initrd) = match plan.jail {
        Some(_) => (jail::KERNEL, jail::INITRD),
        None => (plan.kernel.to_str()?, plan.initrd.to_str()?),
    };
    Some(Config {
        boot_source: BootSource {
            kernel_image_path: kernel.to_owned(),
            initrd_path: initrd.to_owned(),
            boot_args: kernel_parameters(plan),
        },
        drives: plan.disks.iter().enumerate().map(drive).collect(),
        machine_config: Machine {
            vcpu_count: plan.cpus,
            mem_size_mib: plan.memory_mib,
        },
        network_interfaces: nic
            .map(|(nic, cable)| Interface {
                iface_id: NIC,
                host_dev_name: cable.to_owned(),
                guest_mac: nic.mac.map(|byte| format!("{byte:02x}")).join(":"),
            })
            .into_iter()
            .collect(),
        vsock: Vsock {
            guest_cid: GUEST_CID,
            uds_path: VSOCK,
        },
    })
}

fn drive((index, disk): (usize, &DiskPlan)) -> Drive {
    Drive {
        drive_id: disk_name(index),
        path_on_host: disk_name(index),
        // The guest finds its root by itself.
        is_root_device: false,
        is_read_only: disk.read_only,
        // The guest's flushes are obeyed, where there is something to flush.
        cache_type: if disk.read_only {
            "Unsafe"
        } else {
            "Writeback"
        },
    }
}

/// The machine's kernel parameters, then the guest's own, which thereby win. Firecracker adds `pci=off`
/// and where its devices are.
fn kernel_parameters(plan: &VmPlan) -> String {
    let mut words = vec![
        "console=ttyS0 quiet panic=-1".to_owned(),
        // The one way to reset that Firecracker has a device for, and what of that device is not there.
        "reboot=k i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd".to_owned(),
        "8250.nr_uarts=1 random.trust_cpu=on".to_owned(),
        format!("smolvm.vsock={AGENT_PORT}"),
    ];
    // Its ACPI tables are of no use to a kernel without PCI: it begins with them, fails, and is left with
    // half of its interrupts. The older tables say the same (MP specification 1.4).
    if plan.devices == Devices::CommandLine {
        words.push("acpi=off".to_owned());
    }
    if !plan.cmdline.is_empty() {
        words.push(plan.cmdline.clone());
    }
    words.join(" ")
}

/// The VMM's arguments. `config` is where it reads what to boot; without, it waits to be told.
pub(super) fn arguments(plan: &VmPlan, config: Option<&str>) -> Vec<OsString> {
    let mut id = plan.name.replace('_', "-");
    // Letters, digits and `-` only, so a byte is a letter.
    id.truncate(ID_BYTES_MAX);
    let mut words = vec!["--api-sock", SOCKET];
    // Standard output is the guest's console. The jailer names the machine itself.
    match plan.jail {
        Some(_) => words.extend(["--log-path", jail::LOG]),
        None => words.extend(["--id", &id, "--log-path", "/proc/self/fd/2"]),
    }
    words.extend(["--level", "Error"]);
    if let Some(config) = config {
        words.extend(["--config-file", config]);
    }
    words.into_iter().map(OsString::from).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{Accel, JailPlan, Memory, NicPlan};

    pub(in crate::firecracker) fn plan() -> VmPlan {
        VmPlan {
            name: "smolvm-a_b".into(),
            program: "/usr/bin/firecracker".into(),
            directory: "/d/vmm".into(),
            accel: Accel::Kvm,
            cpus: 2,
            memory_mib: 512,
            memory: Memory::Anonymous,
            kernel: "/k/vmlinux".into(),
            devices: Devices::Acpi,
            initrd: "/k/initramfs".into(),
            cmdline: "smolvm.root=/dev/vda".into(),
            disks: vec![
                DiskPlan {
                    path: "/i/root.erofs".into(),
                    read_only: true,
                },
                DiskPlan {
                    path: "/s/disk.ext4".into(),
                    read_only: false,
                },
            ],
            nic: Some(NicPlan {
                mac: [2, 0, 0, 0, 0, 0xab],
            }),
            tsc_khz: None,
            jail: None,
        }
    }

    #[test]
    fn a_machine_is_described_in_one_file() {
        let config = config(&plan(), Some("smol0")).expect("UTF-8");
        let text = serde_json::to_string_pretty(&config).expect("json");
        assert_eq!(
            text,
            r#"{
  "boot-source": {
    "kernel_image_path": "/k/vmlinux",
    "initrd_path": "/k/initramfs",
    "boot_args": "console=ttyS0 quiet panic=-1 reboot=k i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd 8250.nr_uarts=1 random.trust_cpu=on smolvm.vsock=1024 smolvm.root=/dev/vda"
  },
  "drives": [
    {
      "drive_id": "disk0",
      "path_on_host": "disk0",
      "is_root_device": false,
      "is_read_only": true,
      "cache_type": "Unsafe"
    },
    {
      "drive_id": "disk1",
      "path_on_host": "disk1",
      "is_root_device": false,
      "is_read_only": false,
      "cache_type": "Writeback"
    }
  ],
  "machine-config": {
    "vcpu_count": 2,
    "mem_size_mib": 512
  },
  "network-interfaces": [
    {
      "iface_id": "eth0",
      "host_dev_name": "smol0",
      "guest_mac": "02:00:00:00:00:ab"
    }
  ],
  "vsock": {
    "guest_cid": 3,
    "uds_path": "vsock"
  }
}"#
        );
    }

    #[test]
    fn only_a_machine_that_boots_has_a_file_to_read() {
        let text = |config| {
            let words = arguments(&plan(), config);
            let words: Vec<_> = words.iter().filter_map(|word| word.to_str()).collect();
            words.join(" ")
        };
        let both = "--api-sock api.sock --id smolvm-a-b --log-path /proc/self/fd/2 --level Error";
        assert_eq!(text(None), both);
        assert_eq!(text(Some("/c")), format!("{both} --config-file /c"));
    }
    #[test]
    fn in_a_jail_files_have_names_in_its_root_directory() {
        let plan = VmPlan {
            jail: Some(JailPlan {
                program: "/e/jailer".into(),
                id: "a".into(),
                user: 2_000_000,
                limits: None,
            }),
            ..plan()
        };
        let config = config(&plan, None).expect("UTF-8");
        assert_eq!(config.boot_source.kernel_image_path, "kernel");
        assert_eq!(config.boot_source.initrd_path, "initrd");
        let words = arguments(&plan, Some(jail::CONFIG)).join(std::ffi::OsStr::new(" "));
        let text = "--api-sock api.sock --log-path log --level Error --config-file config";
        assert_eq!(words, text);
    }
}
