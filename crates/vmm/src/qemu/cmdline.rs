//! The VMM's arguments. Pure.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::{Accel, DiskPlan, VmPlan};

/// Numbers of the sockets which the VMM inherits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sockets {
    /// To the guest's agent.
    pub agent: RawFd,
    /// Of the guest's first serial port.
    pub console: RawFd,
    /// For control commands (QMP).
    pub monitor: RawFd,
}

/// The arguments that make QEMU be the machine of `plan`.
///
/// The options are those of qemu(1); which of them matter, and how much, is in
/// `docs/decisions/0003-qemu-machine.md`.
#[must_use]
pub fn arguments(plan: &VmPlan, sockets: Sockets) -> Vec<OsString> {
    let mut args = Arguments(Vec::with_capacity(64));
    args.option("-name", &plan.name);
    // Nothing but what is asked for, and no file of the host's that could change it.
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    args.option("-display", "none");
    // A guest that resets has ended: that is how it reports a panic (`panic=-1`).
    args.flag("-no-reboot");
    args.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );

    args.option("-M", MACHINE);
    match plan.accel {
        Accel::Kvm => {
            args.option("-accel", "kvm");
            args.option("-cpu", "host");
        }
        Accel::Emulation => {
            args.option("-accel", "tcg,thread=multi,tb-size=64");
            // The emulator runs `rep movsb` byte by byte, and a kernel that is told that it is fast
            // copies with nothing else: 3-21 instead of 43-76 MiB/s through the agent's channel.
            args.option("-cpu", "max,-erms,-fsrm");
        }
    }
    args.option("-smp", plan.cpus.to_string());
    args.option("-m", plan.memory_mib.to_string());

    args.option("-kernel", &plan.kernel);
    args.option("-initrd", &plan.initrd);
    args.option("-append", kernel_parameters(plan));

    args.socket("console", sockets.console);
    args.option("-serial", "chardev:console");
    args.socket("monitor", sockets.monitor);
    args.option("-mon", "chardev=monitor,mode=control");
    args.socket("agent", sockets.agent);
    // One port and the control queue; the default of 31 ports costs 60 queues and their event
    // descriptors at each start and resume.
    args.option("-device", "virtio-serial-device,max_ports=2");
    args.option("-device", "virtserialport,chardev=agent,name=agent");

    for (index, disk) in plan.disks.iter().enumerate() {
        args.option("-blockdev", block_node(index, disk));
        args.option("-device", block_device(index, disk));
    }
    args.0
}

/// The machine: virtio over memory-mapped I/O, no PCI, no firmware to speak of.
///
/// * `acpi=on`: kernels of distributions are built without `VIRTIO_MMIO_CMDLINE_DEVICES`, so they
///   find the devices in the ACPI tables or not at all.
/// * `rtc=on`: without it the kernel's `rtc_cmos` polls a clock that is not there, for seconds.
/// * Guest memory stays out of core dumps, and out of the host's same-page merging, whose timing
///   tells one guest what another has in memory.
const MACHINE: &str = "microvm,acpi=on,rtc=on,dump-guest-core=off,mem-merge=off";

/// The machine's kernel parameters, then the guest's own, which thereby win.
fn kernel_parameters(plan: &VmPlan) -> String {
    // `reboot=t` resets by triple fault, the one way that needs no device.
    let mut words = vec!["console=ttyS0 quiet panic=-1 reboot=t".to_owned()];
    if plan.accel == Accel::Emulation {
        // The machine has no second clock to measure the time-stamp counter by; unless told its
        // rate, the kernel waits for ever after "Marking TSC unstable".
        words.extend(plan.tsc_khz.map(|khz| format!("tsc_early_khz={khz}")));
        // What takes long when translated and protects from nothing in an emulated CPU.
        words.push("cryptomgr.notests nokaslr mitigations=off random.trust_cpu=on".to_owned());
    }
    if !plan.cmdline.is_empty() {
        words.push(plan.cmdline.clone());
    }
    words.join(" ")
}

/// The node that opens the image. There is no node for the `raw` format on top: it would only pass
/// requests on.
fn block_node(index: usize, disk: &DiskPlan) -> OsString {
    let mut node = OsString::from(format!("driver=file,node-name=disk{index},filename="));
    node.push(escaped(&disk.path));
    node.push(if disk.read_only {
        // Nothing to protect, and a lock would stand in the way of whoever replaces the image.
        ",read-only=on,locking=off"
    } else {
        // The host's page cache is used and the guest's flushes are obeyed: as fast as is safe when
        // the host loses power. What the guest discards, the image gives back. QEMU's own lock
        // stays on: two writers would destroy the file system.
        ",read-only=off,discard=unmap"
    });
    node
}

/// The device that the guest sees. A host that runs out of space gives the guest an I/O error, as a
/// disk does; QEMU's own default, stopping the machine, looks like a hang.
fn block_device(index: usize, disk: &DiskPlan) -> String {
    let on_error = if disk.read_only {
        "rerror=report"
    } else {
        "rerror=report,werror=report"
    };
    format!("virtio-blk-device,drive=disk{index},{on_error}")
}

/// A path as the value of an option, where a comma ends the value unless doubled.
fn escaped(path: &Path) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        out.push(byte);
        if byte == b',' {
            out.push(byte);
        }
    }
    OsString::from_vec(out)
}

/// The list under construction.
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_owned());
    }

    fn socket(&mut self, id: &str, fd: RawFd) {
        self.option("-chardev", format!("socket,id={id},fd={fd}"));
    }
}
