//! The kernel and the image every test starts from, prepared once.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail, ensure};
use rusqlite::{Connection, OpenFlags};
use rustix::fs::FlockOperation;

use crate::binaries::Binaries;

/// A data directory in which `smolvm setup` has done its work.
#[derive(Debug)]
pub struct Assets {
    dir: PathBuf,
}

impl Assets {
    /// The prepared directory; prepares it if no test did before.
    ///
    /// # Panics
    ///
    /// If it cannot be prepared, with all that `smolvm setup` had to say.
    pub fn get(binaries: &Binaries) -> &'static Self {
        static ASSETS: OnceLock<std::result::Result<Assets, String>> = OnceLock::new();
        let prepared =
            ASSETS.get_or_init(|| Self::prepare(binaries).map_err(|error| format!("{error:#}")));
        match prepared {
            Ok(assets) => assets,
            Err(error) => panic!("no test can run: {error}"),
        }
    }

    fn prepare(binaries: &Binaries) -> Result<Self> {
        let dir = match std::env::var_os("SMOLVM_TEST_DATA") {
            Some(dir) => PathBuf::from(dir),
            None => target_dir()?.join("e2e-data"),
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        // Two test programs at once prepare it once.
        let lock = File::create(dir.join("e2e.lock")).context("locking the prepared directory")?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        let assets = Self { dir };
        if !assets.is_ready() {
            let output = Command::new(binaries.smolvm())
                .arg("--data-dir")
                .arg(&assets.dir)
                .arg("setup")
                .stdin(Stdio::null())
                .output()
                .context("running `smolvm setup`")?;
            ensure!(
                output.status.success(),
                "`smolvm setup --data-dir {}` failed ({}):\n{}{}",
                assets.dir.display(),
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
            );
        }
        ensure!(
            assets.is_ready(),
            "`smolvm setup` succeeded, yet {} has no image or no kernel",
            assets.dir.display()
        );
        Ok(assets)
    }

    fn is_ready(&self) -> bool {
        let images = || -> Result<i64> {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
            let store = Connection::open_with_flags(self.dir.join("state.db"), flags)?;
            Ok(store.query_row("SELECT count(*) FROM images", [], |row| row.get(0))?)
        };
        // One that was unpacked before sandboxes had a network has no driver for it.
        let kernel = std::fs::read_to_string(self.dir.join("kernels/stock/kernel.json"));
        kernel.is_ok_and(|kernel| kernel.contains("virtio_net.ko"))
            && images().is_ok_and(|count| count > 0)
    }

    /// The stock kernel's ELF image.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("kernels/stock/vmlinux")
    }

    /// Key of a small kernel; builds it, which takes minutes, if nobody did before.
    ///
    /// # Errors
    ///
    /// With all that `smolvm kernel build` had to say, if it cannot be built.
    pub(crate) fn small_kernel(&self, binaries: &Binaries) -> Result<String> {
        // Two test programs at once build it once: `smolvm` itself sees to that.
        if let Some(key) = self.find_small_kernel()? {
            return Ok(key);
        }
        let output = Command::new(binaries.smolvm())
            .arg("--data-dir")
            .arg(&self.dir)
            .args(["kernel", "build"])
            .stdin(Stdio::null())
            .output()
            .context("running `smolvm kernel build`")?;
        ensure!(
            output.status.success(),
            "`smolvm kernel build --data-dir {}` failed ({}):\n{}",
            self.dir.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr),
        );
        self.find_small_kernel()?
            .context("`smolvm kernel build` succeeded, yet there is no small kernel")
    }

    fn find_small_kernel(&self) -> Result<Option<String>> {
        let mut newest = None;
        for dir in entries(&self.dir.join("kernels"))? {
            let description = dir.join("kernel.json");
            let key = file_name(&dir)?.to_string_lossy().into_owned();
            if key.starts_with("small-") && description.is_file() {
                let built = std::fs::metadata(description)?.modified()?;
                newest = newest.max(Some((built, key)));
            }
        }
        Ok(newest.map(|(_, key)| key))
    }

    /// Lets a home have this kernel beside the stock one.
    pub(crate) fn link_kernel(&self, data: &Path, key: &str) -> Result<()> {
        let kernels = Path::new("kernels");
        let of = |dir: &Path| dir.join(kernels).join(key);
        Ok(symlink(of(&self.dir), of(data))?)
    }

    /// Fills `data`, an empty directory, with a store that knows the images and nothing else, and
    /// with links to the large files. What a sandbox may write to lies in `data` itself.
    pub(crate) fn link_into(&self, data: &Path) -> Result<()> {
        self.fill(data, &|from, to| Ok(symlink(from, to)?))?;
        // Nobody writes to a template once it is made, so one serves every test.
        let templates = self.dir.join("templates");
        std::fs::create_dir_all(&templates)?;
        symlink(templates, data.join("templates"))?;
        Ok(())
    }

    /// The same with copies in place of links.
    pub(crate) fn copy_into(&self, data: &Path) -> Result<()> {
        self.fill(data, &copy)
    }

    fn fill(&self, data: &Path, place: &dyn Fn(&Path, &Path) -> Result<()>) -> Result<()> {
        let store = data.join("state.db");
        let source = Connection::open_with_flags(
            self.dir.join("state.db"),
            OpenFlags::SQLITE_OPEN_READ_WRITE,
        )?;
        let path = store.to_str().context("a path that is not text")?;
        source.execute("VACUUM INTO ?1", [path])?;
        // The copy is not in WAL mode by itself, and the programs leave every store in it.
        let copy = Connection::open(&store)?;
        copy.pragma_update(None, "journal_mode", "wal")?;
        copy.execute_batch("DELETE FROM sandboxes; DELETE FROM host_facts;")?;

        let mut private = std::fs::DirBuilder::new();
        private.mode(0o700);
        // The layer of shared mode is made beside an image, so each test has directories of its own.
        private.create(data.join("images"))?;
        for digest in entries(&self.dir.join("images"))? {
            let own = data.join("images").join(file_name(&digest)?);
            if digest.join("root.erofs").is_file() {
                private.create(&own)?;
                for file in entries(&digest)? {
                    if file_name(&file)? != "shared.ext4" {
                        place(&file, &own.join(file_name(&file)?))?;
                    }
                }
            }
        }
        private.create(data.join("kernels"))?;
        place(&self.dir.join("kernels/stock"), &data.join("kernels/stock"))?;
        let cache = self.dir.join("cache");
        std::fs::create_dir_all(&cache)?;
        place(&cache, &data.join("cache"))?;
        private.create(data.join("sandboxes"))?;
        Ok(())
    }
}

/// Copies a file or directory, keeping holes.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp")
        .args(["--recursive", "--sparse=always", "--reflink=auto", "--"])
        .args([from, to])
        .status()
        .context("running cp")?;
    ensure!(status.success(), "copying {} failed", from.display());
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .with_context(|| format!("listing {}", dir.display()))
}

fn file_name(path: &Path) -> Result<&std::ffi::OsStr> {
    path.file_name().context("a path without a name")
}

/// The target directory: the outermost with cargo's tag, since each target in it has one too.
fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let tagged = exe
        .ancestors()
        .filter(|dir| dir.join("CACHEDIR.TAG").is_file());
    match tagged.last() {
        Some(dir) => Ok(dir.to_owned()),
        None => bail!(
            "{} is in no target directory; set SMOLVM_TEST_DATA",
            exe.display()
        ),
    }
}
