//! Where everything lies below the data directory. Every path is derived, none is stored, so that
//! leftovers are found even if the database is lost.
//!
//! ```text
//! state.db                         the store
//! images/<digest>/                 root.erofs, manifest.json, shared.ext4 (made on first use)
//! images/.making-*, .removed-*     images on their way in and out
//! images/downloads/                layers of images that are being pulled, and locks of pulls
//! builds/<key>/                    disk.ext4: a layer that a build keeps
//! kernels/<key>/                   vmlinux, modules/, kernel.json, initramfs-<agent stamp>.cpio
//! engines/firecracker-v<version>/  firecracker, jailer, release.json
//! templates/<purpose>-<ingredients>/  memory, state, disk.ext4, template.json
//! snapshots/<id>/                  memory, state, disk.ext4, snapshot.json
//! volumes/                         <id>.ext4
//! pools/                           <id>.json, <id>.lock, <id>.log
//! ssh/                             id_ed25519, id_ed25519.pub, lock
//! cache/ext4-<size MiB>.img        empty writable layers to copy
//! sandboxes/<id>/                  lock, launch.json, keeper.sock, disk.ext4, console.log, keeper.log,
//!                                  denied.json
//!                                  host_key and known_hosts (made on first use)
//! ```

use std::path::{Path, PathBuf};

/// The data directory.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The layout below `root`.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The data directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The state database.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.root.join("state.db")
    }

    /// All images.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// One image, by its digest (`sha256:…`).
    #[must_use]
    pub fn image(&self, digest: &str) -> PathBuf {
        self.images().join(digest.replace(':', "-"))
    }

    /// Layers of images that are being pulled.
    #[must_use]
    pub fn downloads(&self) -> PathBuf {
        self.images().join("downloads")
    }

    /// All layers that builds keep.
    #[must_use]
    pub fn builds(&self) -> PathBuf {
        self.root.join("builds")
    }

    /// One of them, by its key.
    #[must_use]
    pub fn build_layer(&self, key: &str) -> PathBuf {
        self.builds().join(key)
    }

    /// All kernels.
    #[must_use]
    pub fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// Releases of VMMs that are fetched rather than installed.
    #[must_use]
    pub fn engines(&self) -> PathBuf {
        self.root.join("engines")
    }

    /// All templates.
    #[must_use]
    pub fn templates(&self) -> PathBuf {
        self.root.join("templates")
    }

    /// All snapshots.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// All volumes.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    /// The disk of one volume.
    #[must_use]
    pub fn volume(&self, id: &str) -> PathBuf {
        self.volumes().join(format!("{id}.ext4"))
    }

    /// Files of the pools.
    #[must_use]
    pub fn pools(&self) -> PathBuf {
        self.root.join("pools")
    }

    /// Keys of whoever owns the directory.
    #[must_use]
    pub fn ssh(&self) -> PathBuf {
        self.root.join("ssh")
    }

    /// Files that can be made again.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// An empty writable layer of this size.
    #[must_use]
    pub fn empty_layer(&self, size_mib: u32) -> PathBuf {
        self.cache().join(format!("ext4-{size_mib}.img"))
    }

    /// All sandboxes.
    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// One sandbox.
    #[must_use]
    pub fn sandbox(&self, id: &str) -> SandboxDir {
        SandboxDir {
            path: self.sandboxes().join(id),
        }
    }
}

/// The directory of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxDir {
    path: PathBuf,
}

impl SandboxDir {
    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Locked by whoever runs the sandbox: first the process that starts it, then its keeper.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// What the keeper is told.
    #[must_use]
    pub fn launch_file(&self) -> PathBuf {
        self.path.join("launch.json")
    }

    /// The keeper's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET_NAME)
    }

    /// The writable layer.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.path.join("disk.ext4")
    }

    /// The engine's own directory, which is there while the machine runs.
    #[must_use]
    pub fn vmm(&self) -> PathBuf {
        self.path.join("vmm")
    }

    /// What the guest wrote to its console.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What was denied to it, as of the last time somebody asked, or of its end.
    #[must_use]
    pub fn denied(&self) -> PathBuf {
        self.path.join("denied.json")
    }

    /// The key by which SSH clients know the sandbox.
    #[must_use]
    pub fn host_key(&self) -> PathBuf {
        self.path.join("host_key")
    }

    /// Its public half, as SSH clients read it.
    #[must_use]
    pub fn known_hosts(&self) -> PathBuf {
        self.path.join("known_hosts")
    }

    /// What the keeper had to say.
    #[must_use]
    pub fn keeper_log(&self) -> PathBuf {
        self.path.join("keeper.log")
    }
}

/// The files of a machine that was saved: a template's or a snapshot's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedMachine {
    dir: PathBuf,
}

impl SavedMachine {
    /// The files in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// State of the machine's CPUs and devices.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The writable layer, if the machine has one.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.ext4")
    }
}

/// File name of the keeper's socket in the sandbox's directory.
pub const SOCKET_NAME: &str = "keeper.sock";
