//! From a sandbox's row and the facts of the host to a launch in which nothing is left to decide.
//! Pure: no clock, no randomness, no file.

use std::path::PathBuf;
use std::time::Duration;

use smolvm_host::ProcessIdentity;
use smolvm_host::net::alloc::PortRange;
use smolvm_vmm::{Accel, Devices, DiskPlan, Memory, NicPlan, VmPlan};

use crate::engines::EngineName;
use crate::launch::Launch;
use crate::layout::Layout;
use crate::network::NetworkLaunch;
use crate::spec::DiskMode;
use crate::store::SandboxRow;
use crate::volumes::VolumeLaunch;

/// What planning has to know about the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostFacts {
    /// The engine.
    pub(crate) engine: EngineName,
    /// The engine's program.
    pub(crate) program: PathBuf,
    /// What locks that in, if anything does.
    pub(crate) jailer: Option<PathBuf>,
    /// How guest instructions run.
    pub(crate) accel: Accel,
    /// Frequency of the time-stamp counter in kHz, measured where the machine needs it.
    pub(crate) tsc_khz: Option<u64>,
    /// The kernel.
    pub(crate) vmlinux: PathBuf,
    /// How the kernel finds the machine's devices.
    pub(crate) devices: Devices,
    /// The initial RAM file system.
    pub(crate) initramfs: PathBuf,
    /// Most time from start to ready.
    pub(crate) boot_timeout: Duration,
}

/// Where a sandbox's changes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layer {
    /// This file, to be made from an empty layer if it is not there.
    File(PathBuf),
    /// The guest's memory.
    Memory,
}

/// Where a sandbox's changes go.
pub(crate) fn layer(row: &SandboxRow, layout: &Layout) -> Layer {
    match row.spec.disk_mode {
        DiskMode::Isolated => Layer::File(layout.sandbox(&row.id).disk()),
        DiskMode::Shared => Layer::File(layout.image(&row.image_digest).join("shared.ext4")),
        DiskMode::Memory => Layer::Memory,
    }
}

/// The launch of a sandbox on this host.
pub(crate) fn plan(
    row: &SandboxRow,
    layout: &Layout,
    facts: &HostFacts,
    starter: &ProcessIdentity,
    network: Option<NetworkLaunch>,
    mut volumes: Vec<VolumeLaunch>,
) -> Launch {
    let mut disks = vec![DiskPlan {
        path: layout.image(&row.image_digest).join("root.erofs"),
        read_only: true,
    }];
    let upper = match layer(row, layout) {
        Layer::File(path) => {
            disks.push(DiskPlan {
                path,
                read_only: false,
            });
            "/dev/vdb"
        }
        Layer::Memory => "tmpfs",
    };
    for volume in &mut volumes {
        // Devices have letters in the order of the disks; there are far fewer than letters.
        let letter = (b'a'..=b'z').nth(disks.len()).unwrap_or(b'z');
        volume.device = format!("/dev/vd{}", char::from(letter));
        disks.push(DiskPlan {
            path: volume.path.clone(),
            read_only: volume.read_only,
        });
    }
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    // A member of a pool has no name yet; its guest's host name has to be one.
    let name = match &row.pool {
        Some(_) => format!("pool-{}", row.id),
        None => row.spec.name.to_string(),
    };
    Launch {
        id: row.id.clone(),
        name: name.clone(),
        data_dir: layout.root().to_owned(),
        engine: facts.engine.to_string(),
        vm: VmPlan {
            name: format!("smolvm-{name}"),
            program: facts.program.clone(),
            directory: layout.sandbox(&row.id).vmm(),
            accel: facts.accel,
            cpus: row.spec.cpus,
            memory_mib: row.spec.memory_mib,
            memory: Memory::Anonymous,
            kernel: facts.vmlinux.clone(),
            devices: facts.devices,
            initrd: facts.initramfs.clone(),
            cmdline: format!("smolvm.root=/dev/vda smolvm.rootfs=erofs smolvm.upper={upper}"),
            disks,
            nic: network
                .as_ref()
                .map(|network| NicPlan { mac: network.mac() }),
            tsc_khz: facts.tsc_khz,
            jail: None,
        },
        network,
        env: row.spec.env.clone(),
        workdir: row.spec.workdir.clone(),
        user: row.spec.user.clone(),
        ttl_ms: row.spec.ttl.map(millis),
        ephemeral: row.spec.ephemeral,
        starter: row.spec.ephemeral.then(|| starter.clone()),
        restore: None,
        park: None,
        ports: row.spec.ports.clone(),
        ssh_ports: PortRange::default(),
        volumes,
        mounts: row.spec.mounts.clone(),
        snapshot: None,
        boot_timeout_ms: millis(facts.boot_timeout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::tests::row;

    fn starter() -> ProcessIdentity {
        ProcessIdentity {
            pid: 1,
            start_time_ticks: 1,
            boot_id: "b".to_owned(),
        }
    }

    fn facts() -> HostFacts {
        HostFacts {
            engine: EngineName::Qemu,
            program: "/usr/bin/qemu-system-x86_64".into(),
            jailer: None,
            accel: Accel::Emulation,
            tsc_khz: Some(2_445_425),
            vmlinux: "/d/kernels/stock/vmlinux".into(),
            devices: Devices::Acpi,
            initramfs: "/d/kernels/stock/initramfs.cpio".into(),
            boot_timeout: Duration::from_secs(60),
        }
    }

    #[test]
    fn each_disk_mode_has_its_layer() {
        let layout = Layout::new("/d".into());
        let mut row = row("a");
        for (mode, disks, upper) in [
            (
                DiskMode::Isolated,
                vec![
                    "/d/images/sha256-0/root.erofs",
                    "/d/sandboxes/id-a/disk.ext4",
                ],
                "/dev/vdb",
            ),
            (
                DiskMode::Shared,
                vec![
                    "/d/images/sha256-0/root.erofs",
                    "/d/images/sha256-0/shared.ext4",
                ],
                "/dev/vdb",
            ),
            (
                DiskMode::Memory,
                vec!["/d/images/sha256-0/root.erofs"],
                "tmpfs",
            ),
        ] {
            row.spec.disk_mode = mode;
            let launch = plan(&row, &layout, &facts(), &starter(), None, Vec::new());
            let paths: Vec<_> = launch
                .vm
                .disks
                .iter()
                .map(|disk| disk.path.to_str().expect("utf-8"))
                .collect();
            assert_eq!(paths, disks);
            assert!(launch.vm.disks[0].read_only);
            assert!(
                launch
                    .vm
                    .cmdline
                    .ends_with(&format!("smolvm.upper={upper}"))
            );
        }
    }

    #[test]
    fn volumes_are_the_last_disks_and_know_their_devices() {
        let volume = |name: &str, read_only| VolumeLaunch {
            path: format!("/d/volumes/{name}.ext4").into(),
            bytes: 1,
            device: String::new(),
            target: format!("/{name}"),
            read_only,
        };
        let volumes = || vec![volume("a", false), volume("b", true)];
        let layout = Layout::new("/d".into());
        let mut row = row("a");
        for (mode, devices) in [
            (DiskMode::Isolated, ["/dev/vdc", "/dev/vdd"]),
            (DiskMode::Memory, ["/dev/vdb", "/dev/vdc"]),
        ] {
            row.spec.disk_mode = mode;
            let launch = plan(&row, &layout, &facts(), &starter(), None, volumes());
            let known: Vec<_> = launch.volumes.iter().map(|volume| &volume.device).collect();
            assert_eq!(known, devices.iter().collect::<Vec<_>>());
            let [.., first, second] = &launch.vm.disks[..] else {
                panic!("too few disks");
            };
            assert_eq!(first.path, launch.volumes[0].path);
            assert_eq!([first.read_only, second.read_only], [false, true]);
            assert!(launch.writes_to_volumes());
        }
    }

    #[test]
    fn a_launch_comes_back_as_it_was_written() {
        let launch = plan(
            &row("a"),
            &Layout::new("/d".into()),
            &facts(),
            &starter(),
            None,
            Vec::new(),
        );
        let text = serde_json::to_string(&launch).expect("json");
        assert_eq!(serde_json::from_str::<Launch>(&text).expect("json"), launch);
        assert_eq!(launch.ttl_ms, Some(7000));
    }
}
