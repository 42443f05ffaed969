//! A place for sandboxes on the fake backend.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smolvm_engine::layout::Layout;
use smolvm_engine::store::{ImageRow, Store};
use smolvm_engine::{
    AccelChoice, Config, Engine, ExecEvent, ExecSpec, Result, SandboxSpec, Session, Settings,
};
use smolvm_host::packages::SYSTEM_DIRS;

/// Most time a keeper may take to end on a busy host.
const PATIENCE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// A data directory with an image and a kernel that only the fake could boot.
pub(crate) struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        let home = Self {
            dir: tempfile::tempdir().expect("a directory"),
        };
        let layout = home.layout();
        let write = |path: PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            std::fs::write(path, text).expect("a file");
        };
        write(layout.image("sha256:0").join("root.erofs"), "");
        let stock = layout.kernels().join("stock");
        write(stock.join("vmlinux"), "");
        write(
            stock.join("kernel.json"),
            r#"{"release": "1", "source": "a test", "digest": "sha256:0", "modules": []}"#,
        );
        write(home.path("bin/smolvm-agent"), "");
        write(home.path("bin/qemu-system-x86_64"), "");
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(home.path("bin/qemu-system-x86_64"), executable).expect("a mode");
        let mut store = Store::open(&layout.database()).expect("a store");
        store
            .put_image(&ImageRow {
                name: "debian-12".to_owned(),
                digest: "sha256:0".to_owned(),
                size_bytes: 0,
                created_at: jiff::Timestamp::UNIX_EPOCH,
                source: "a test".to_owned(),
                manifest: None,
                config: smolvm_engine::ImageConfig::default(),
            })
            .expect("an image");
        home
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.path("data dir"))
    }

    pub(crate) fn config(&self) -> Config {
        // Examples are built beside the folder of the test programs.
        let here = std::env::current_exe().expect("this program");
        let built = here
            .parent()
            .and_then(Path::parent)
            .expect("the build's folder");
        Config {
            data_dir: self.path("data dir"),
            keeper: built.join("examples/keeper-on-fake"),
            agent: self.path("bin/smolvm-agent"),
            program_dirs: std::iter::once(self.path("bin"))
                .chain(SYSTEM_DIRS.map(PathBuf::from))
                .collect(),
            accel: AccelChoice::Emulation,
            engine: smolvm_engine::EngineChoice::Qemu,
            templates: true,
            boot_timeout: Duration::from_secs(20),
            settings: Settings::default(),
            network: smolvm_engine::NetworkConfig::default(),
            registries: smolvm_engine::RegistrySettings::default(),
        }
    }

    pub(crate) fn engine(&self) -> Engine {
        Engine::new(self.config())
    }

    /// Waits for the keepers that take away a sandbox which nobody sees any more.
    pub(crate) fn wait_for_removals(&self) {
        let rows = Store::open(&self.layout().database())
            .and_then(|store| store.sandboxes())
            .expect("the rows");
        for holder in rows.iter().filter_map(|row| row.holder.as_ref()) {
            if let Some(process) = holder.open().expect("a process") {
                let mut ended = [PollFd::new(&process, PollFlags::IN)];
                poll(&mut ended, Some(&PATIENCE)).expect("a wait");
                assert!(!ended[0].revents().is_empty(), "a keeper does not end");
            }
        }
    }

    /// Nothing is left: no row, no directory, no process.
    pub(crate) fn assert_clean(&self, what: &str) {
        self.wait_for_removals();
        let rows = self.engine().list().expect("a list");
        assert!(rows.is_empty(), "{what}: rows are left: {rows:?}");
        let left: Vec<_> = std::fs::read_dir(self.layout().sandboxes())
            .map(|entries| {
                entries
                    .map(|entry| entry.expect("an entry").path())
                    .collect()
            })
            .unwrap_or_default();
        assert!(left.is_empty(), "{what}: directories are left: {left:?}");
        let snapshots = self.engine().snapshots().expect("a list");
        assert!(snapshots.is_empty(), "{what}: left: {snapshots:?}");
        let left: Vec<_> = std::fs::read_dir(self.layout().snapshots())
            .map(|entries| {
                entries
                    .map(|entry| entry.expect("an entry").path())
                    .collect()
            })
            .unwrap_or_default();
        assert!(left.is_empty(), "{what}: directories are left: {left:?}");
        let volumes = self.engine().volumes().expect("a list");
        assert!(volumes.is_empty(), "{what}: left: {volumes:?}");
        let left: Vec<_> = std::fs::read_dir(self.layout().volumes())
            .map(|entries| {
                entries
                    .map(|entry| entry.expect("an entry").path())
                    .collect()
            })
            .unwrap_or_default();
        assert!(left.is_empty(), "{what}: disks are left: {left:?}");
    }
}

pub(crate) fn spec(name: &str) -> SandboxSpec {
    SandboxSpec::new(name.parse().expect("a name"))
}

pub(crate) async fn output(session: &Session, argv: &[&str]) -> Result<String> {
    let argv = argv.iter().map(Into::into).collect();
    let mut command = session.exec(&ExecSpec::new(argv)).await?;
    let mut text = Vec::new();
    loop {
        match command.next().await? {
            ExecEvent::Stdout(bytes) => text.extend(bytes),
            ExecEvent::Stderr(_) => {}
            ExecEvent::Exited(_) => return Ok(String::from_utf8_lossy(&text).into_owned()),
        }
    }
}
