//! The VMM's arguments. Pure.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::{Accel, Devices, DiskPlan, Memory, NicPlan, VmPlan};

/// Numbers of the descriptors which the VMM inherits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// To the guest's agent.
    pub agent: RawFd,
    /// Of the guest's first serial port.
    pub console: RawFd,
    /// For control commands (QMP).
    pub monitor: RawFd,
    /// The TAP device that the network device is connected to, if there is one.
    pub cable: Option<RawFd>,
}

/// The arguments that make QEMU be the machine of `plan`.
///
/// The options are those of qemu(1); which of them matter, and how much, is in
/// `docs/decisions/0003-qemu-machine.md`.
#[must_use]
pub fn arguments(plan: &VmPlan, fds: Descriptors) -> Vec<OsString> {
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

    let restored = matches!(plan.memory, Memory::CopyOf(_));
    let mut machine = machine(plan.devices);
    if let Some(backend) = memory_backend(plan) {
        args.option("-object", backend);
        machine.push_str(",memory-backend=ram");
    }
    if restored {
        // Wait to be told where the state is that goes with that memory. Neither does it begin with
        // a description of the machine, nor end with one of itself.
        machine.push_str(",suppress-vmdesc=on");
        args.option("-incoming", "defer");
        args.option("-global", "migration.send-configuration=off");
    }
    args.option("-M", machine);
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

    // One that is restored has its kernel in memory. Reading it again would only cost time, and
    // the state fits without.
    if !restored {
        args.option("-kernel", &plan.kernel);
        args.option("-initrd", &plan.initrd);
        args.option("-append", kernel_parameters(plan));
    }

    args.socket("console", fds.console);
    args.option("-serial", "chardev:console");
    args.socket("monitor", fds.monitor);
    args.option("-mon", "chardev=monitor,mode=control");
    args.socket("agent", fds.agent);
    // One port and the control queue; the default of 31 ports costs 60 queues and their event
    // descriptors at each start and resume.
    args.option("-device", "virtio-serial-device,max_ports=2");
    args.option("-device", "virtserialport,chardev=agent,name=agent");

    for (index, disk) in plan.disks.iter().enumerate() {
        args.option("-blockdev", block_node(index, disk));
        args.option("-device", block_device(index, disk));
    }
    // Last, so that a machine with it is like one without in everything before. No helper script and
    // no helper program: the device is there already.
    if let (Some(nic), Some(cable)) = (&plan.nic, fds.cable) {
        args.option("-netdev", format!("tap,id=net0,fd={cable}"));
        args.option("-device", nic_device(nic));
    }
    args.0
}

/// The machine: virtio over memory-mapped I/O, no PCI, no firmware to speak of.
///
/// * `acpi`: kernels of distributions are built without `VIRTIO_MMIO_CMDLINE_DEVICES`, so they
///   find the devices in the ACPI tables or not at all. Without these tables QEMU writes the devices
///   on the kernel's command line, after our parameters, and the processors in an MP table.
/// * `rtc=on`: without it a kernel polls a clock that is not there, for one second or more.
/// * `pit=off,pic=off,x-option-roms=off`: an older timer, an older interrupt controller and boot ROMs
///   that no 64-bit kernel started directly makes use of.
/// * Guest memory stays out of core dumps, and out of the host's same-page merging, whose timing
///   tells one guest what another has in memory.
fn machine(devices: Devices) -> String {
    let acpi = match devices {
        Devices::Acpi => "on",
        Devices::CommandLine => "off",
    };
    format!(
        "microvm,acpi={acpi},rtc=on,pit=off,pic=off,x-option-roms=off,dump-guest-core=off,\
         mem-merge=off"
    )
}

/// Ticks per millisecond of the local APIC's timer in QEMU's emulation, whose counter runs in
/// nanoseconds (`apic_get_current_count`, hw/intc/apic_common.c).
const APIC_TIMER_KHZ: u32 = 1_000_000;

/// The object that is the guest's memory, if it is held in a file. The machine's options about core
/// dumps and merging are those of memory that the machine makes itself, so they are repeated.
fn memory_backend(plan: &VmPlan) -> Option<OsString> {
    let (path, share) = match &plan.memory {
        Memory::Anonymous => return None,
        Memory::File(path) => (path, "on"),
        // The file is opened for writing nevertheless: QEMU 7.2 takes `readonly=on` to mean the
        // guest's memory, too. A private mapping writes nothing back.
        Memory::CopyOf(path) => (path, "off"),
    };
    let mut object = OsString::from(format!(
        "memory-backend-file,id=ram,size={}M,share={share},prealloc=off,dump=off,merge=off,\
         mem-path=",
        plan.memory_mib
    ));
    object.push(escaped(path));
    Some(object)
}

/// The machine's kernel parameters, then the guest's own, which thereby win.
fn kernel_parameters(plan: &VmPlan) -> String {
    // `reboot=t` resets by triple fault, the one way that needs no device.
    let mut words = vec!["console=ttyS0 quiet panic=-1 reboot=t".to_owned()];
    if plan.accel == Accel::Emulation {
        // The machine has no second clock to measure the time-stamp counter by, so the kernel is
        // told its rate.
        words.extend(plan.tsc_khz.map(|khz| format!("tsc_early_khz={khz}")));
        // And to trust it: it is the host's own. The kernel would compare it with the timer
        // interrupt, and between CPUs, which goes wrong on a busy host; it then falls back to
        // counting interrupts, and the guest's clock loses up to a third of its time.
        words.push("tsc=reliable".to_owned());
        // Nor is the timer's interrupt to be checked: where it comes late, the check ends in a panic.
        words.push("no_timer_check".to_owned());
        // The rate of that timer, for kernels that can be told (the small one's `lapic_khz`). Others
        // measure it, for 220 ms, and wrong on a busy host.
        if plan.devices == Devices::CommandLine {
            words.push(format!("lapic_khz={APIC_TIMER_KHZ}"));
        }
        // What takes long when translated and protects from nothing in an emulated CPU.
        words.push("cryptomgr.notests nokaslr mitigations=off random.trust_cpu=on".to_owned());
        // QEMU 7.2 finds translated code by its virtual address, among others, so a program that is
        // loaded at another address each time is translated anew each time, libraries and all: a
        // command takes three times as long. The guest's programs do without this protection from
        // each other; what keeps the guest in is the machine around it.
        words.push("norandmaps".to_owned());
    }
    if !plan.cmdline.is_empty() {
        words.push(plan.cmdline.clone());
    }
    words.join(" ")
}

/// Beginning of the names that QEMU has for disks; the disk's number follows.
const NODE: &str = "disk";

/// QEMU's name for a disk.
pub(super) fn node_of(disk: usize) -> String {
    format!("{NODE}{disk}")
}

/// The disk of this name.
pub(super) fn disk_of(node: &str) -> Option<usize> {
    node.strip_prefix(NODE)?.parse().ok()
}

/// The node that opens the image. There is no node for the `raw` format on top: it would only pass
/// requests on.
fn block_node(index: usize, disk: &DiskPlan) -> OsString {
    let mut node = OsString::from(format!("driver=file,node-name={NODE}{index},filename="));
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
    format!("virtio-blk-device,drive={NODE}{index},{on_error}")
}

/// The network device. One queue and its default of 256 frames: the guest's driver fills it at each
/// boot.
fn nic_device(nic: &NicPlan) -> String {
    let [a, b, c, d, e, f] = nic.mac;
    format!("virtio-net-device,netdev=net0,mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const FDS: Descriptors = Descriptors {
        agent: 10,
        console: 11,
        monitor: 12,
        cable: Some(13),
    };

    fn plan(accel: Accel) -> VmPlan {
        VmPlan {
            name: "quiet-otter".into(),
            program: "/usr/bin/qemu-system-x86_64".into(),
            directory: PathBuf::new(),
            accel,
            cpus: 2,
            memory_mib: 512,
            memory: Memory::Anonymous,
            kernel: "/cache/vmlinux".into(),
            devices: Devices::Acpi,
            initrd: "/cache/initrd".into(),
            cmdline: "rdinit=/agent".into(),
            disks: vec![
                DiskPlan {
                    path: "/cache/root.erofs".into(),
                    read_only: true,
                },
                DiskPlan {
                    path: "/run/a,b/upper.img".into(),
                    read_only: false,
                },
            ],
            nic: None,
            tsc_khz: Some(2_445_425),
            jail: None,
        }
    }

    /// The arguments as one text, an option with its value on a line.
    fn text(plan: &VmPlan) -> String {
        let mut text = String::new();
        for argument in arguments(plan, FDS) {
            let argument = argument.into_string().expect("UTF-8");
            let begins_option = argument.starts_with('-');
            if !text.is_empty() {
                text.push(if begins_option { '\n' } else { ' ' });
            }
            text.push_str(&argument);
        }
        text
    }

    const BEGINNING: &str = "\
-name quiet-otter
-nodefaults
-no-user-config
-display none
-no-reboot
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-M microvm,acpi=on,rtc=on,pit=off,pic=off,x-option-roms=off,dump-guest-core=off,mem-merge=off
";

    const END: &str = "
-chardev socket,id=console,fd=11
-serial chardev:console
-chardev socket,id=monitor,fd=12
-mon chardev=monitor,mode=control
-chardev socket,id=agent,fd=10
-device virtio-serial-device,max_ports=2
-device virtserialport,chardev=agent,name=agent
-blockdev driver=file,node-name=disk0,filename=/cache/root.erofs,read-only=on,locking=off
-device virtio-blk-device,drive=disk0,rerror=report
-blockdev driver=file,node-name=disk1,filename=/run/a,,b/upper.img,read-only=off,discard=unmap
-device virtio-blk-device,drive=disk1,rerror=report,werror=report";

    #[test]
    fn emulation() {
        let middle = "\
-accel tcg,thread=multi,tb-size=64
-cpu max,-erms,-fsrm
-smp 2
-m 512
-kernel /cache/vmlinux
-initrd /cache/initrd
-append console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz=2445425 tsc=reliable no_timer_check \
cryptomgr.notests nokaslr mitigations=off random.trust_cpu=on norandmaps rdinit=/agent";
        let text = text(&plan(Accel::Emulation));
        assert_eq!(text, format!("{BEGINNING}{middle}{END}"));
    }

    #[test]
    fn hypervisor() {
        let middle = "\
-accel kvm
-cpu host
-smp 2
-m 512
-kernel /cache/vmlinux
-initrd /cache/initrd
-append console=ttyS0 quiet panic=-1 reboot=t rdinit=/agent";
        let text = text(&plan(Accel::Kvm));
        assert_eq!(text, format!("{BEGINNING}{middle}{END}"));
    }

    /// What a kernel that finds its devices on its command line changes, and whether nothing else.
    #[test]
    fn devices() {
        for accel in [Accel::Kvm, Accel::Emulation] {
            let acpi = plan(accel);
            let command_line = VmPlan {
                devices: Devices::CommandLine,
                ..acpi.clone()
            };
            assert_eq!(
                text(&command_line),
                text(&acpi)
                    .replace("acpi=on", "acpi=off")
                    .replace("no_timer_check", "no_timer_check lapic_khz=1000000")
            );
        }
    }

    #[test]
    fn a_network_device_comes_after_everything_else() {
        let without = plan(Accel::Kvm);
        let with = VmPlan {
            nic: Some(NicPlan {
                mac: [0x06, 0x73, 172, 16, 0, 2],
            }),
            ..without.clone()
        };
        let added = "\n-netdev tap,id=net0,fd=13\n\
                     -device virtio-net-device,netdev=net0,mac=06:73:ac:10:00:02";
        assert_eq!(text(&with), text(&without) + added);
    }

    /// What each kind of memory adds to the arguments, and whether it leaves the others as they are.
    #[test]
    fn memory() {
        let without = plan(Accel::Kvm);
        let machine = "-M microvm,acpi=on,rtc=on,pit=off,pic=off,x-option-roms=off,\
                       dump-guest-core=off,mem-merge=off";
        let object = |share| {
            format!(
                "-object memory-backend-file,id=ram,size=512M,share={share},prealloc=off,dump=off,\
                 merge=off,mem-path=/run/a,,b/memory\n"
            )
        };
        let path = || PathBuf::from("/run/a,b/memory");
        let with = |memory| {
            text(&VmPlan {
                memory,
                ..without.clone()
            })
        };
        let expected = |replacement: &str| text(&without).replace(machine, replacement);
        assert_eq!(with(Memory::Anonymous), expected(machine));
        let own = format!("{}{machine},memory-backend=ram", object("on"));
        assert_eq!(with(Memory::File(path())), expected(&own));
        let copy = format!(
            "{}-incoming defer\n-global migration.send-configuration=off\n\
             {machine},memory-backend=ram,suppress-vmdesc=on",
            object("off")
        );
        let kernel = "-kernel /cache/vmlinux\n-initrd /cache/initrd\n\
                      -append console=ttyS0 quiet panic=-1 reboot=t rdinit=/agent\n";
        let copy = expected(&copy).replace(kernel, "");
        assert_eq!(with(Memory::CopyOf(path())), copy);
    }

    #[test]
    fn the_kernel_parameters_are_one_argument() {
        let args = arguments(&plan(Accel::Kvm), FDS);
        let append = args.iter().position(|arg| arg == "-append");
        let value = append.and_then(|at| args.get(at + 1));
        assert!(
            value.is_some_and(|value| value.to_string_lossy().ends_with("reboot=t rdinit=/agent"))
        );
    }

    #[test]
    fn a_path_need_not_be_utf_8() {
        let path = Path::new(OsStr::from_bytes(b"/x\xff,/y"));
        assert_eq!(escaped(path).as_bytes(), b"/x\xff,,/y");
    }
}
