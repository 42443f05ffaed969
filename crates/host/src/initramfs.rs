//! The initial RAM file system: the agent, the modules it loads, and nothing else.
//!
//! The format is "newc" of cpio, as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it. It is written here
//! because it is one header per file; uncompressed, because unpacking is slow under emulation and
//! the file stays in the host's page cache.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::{HostError, HostErrorKind};
use crate::os::{Durability, Os};

/// What goes into an initial RAM file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initramfs {
    /// The program that becomes `/init`.
    pub agent: PathBuf,
    /// Kernel modules in the order in which they are to be loaded. They become
    /// `/modules/<name>.ko`, and `/modules/order` lists their file names, one a line.
    pub modules: Vec<PathBuf>,
}

/// Writes the archive to `dest` in one step, replacing what is there. Equal input makes equal
/// bytes: every owner is 0 and every time too.
///
/// Beside `/init` and `/modules` it holds the empty directories `/dev`, `/proc` and `/sys`, and
/// the device node `/dev/console`, which the kernel opens as the agent's standard streams before
/// anybody can have mounted a devtmpfs (`console_on_rootfs` in `init/main.c`).
///
/// # Errors
///
/// [`NotFound`](HostErrorKind::NotFound) if the agent or a module is not there;
/// [`AlreadyExists`](HostErrorKind::AlreadyExists) if two modules have the same file name. `dest`
/// is as it was after an error.
pub fn write_initramfs(os: &Os, content: &Initramfs, dest: &Path) -> Result<(), HostError> {
    let mut cpio = Cpio::default();
    let add = |cpio: &mut Cpio, name: &str, mode, data: &[u8], path: &Path| {
        cpio.add(name, mode, (0, 0), data)
            .map_err(|e| HostError::io("pack", path, e))
    };
    for name in ["dev", "modules", "proc", "sys"] {
        add(&mut cpio, name, DIRECTORY | 0o755, &[], Path::new(name))?;
    }
    cpio.add("dev/console", CHARACTER_DEVICE | 0o600, CONSOLE, &[])
        .map_err(|e| HostError::io("pack", Path::new("/dev/console"), e))?;
    let agent = os.read("read the agent", &content.agent)?;
    add(&mut cpio, "init", REGULAR | 0o755, &agent, &content.agent)?;
    let mut order = String::new();
    let mut seen = std::collections::BTreeSet::new();
    for path in &content.modules {
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .filter(|n| !n.contains('\n') && *n != "order")
            .ok_or_else(|| {
                HostError::new(HostErrorKind::Other, "pack", path.display().to_string())
                    .because("a module's file name must be one line of text")
            })?;
        if !seen.insert(name) {
            let error = HostError::new(
                HostErrorKind::AlreadyExists,
                "pack",
                path.display().to_string(),
            );
            return Err(error.because("another module has the same file name"));
        }
        order.push_str(name);
        order.push('\n');
        let module = os.read("read a module", path)?;
        add(
            &mut cpio,
            &format!("modules/{name}"),
            REGULAR | 0o644,
            &module,
            path,
        )?;
    }
    add(
        &mut cpio,
        "modules/order",
        REGULAR | 0o644,
        order.as_bytes(),
        dest,
    )?;
    let archive = cpio.finish().map_err(|e| HostError::io("pack", dest, e))?;
    os.write_file_atomic(
        "write the initial RAM file system",
        dest,
        &archive,
        0o600,
        Durability::Cached,
    )
}

// inode(7).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
/// `/dev/console`: `Documentation/admin-guide/devices.txt`.
const CONSOLE: (u32, u32) = (5, 1);

#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    /// Adds an entry; directories before what is in them. Fails only if `data` has 4 GiB or more,
    /// which the format's eight digits cannot say.
    fn add(
        &mut self,
        name: &str,
        mode: u32,
        (rmajor, rminor): (u32, u32),
        data: &[u8],
    ) -> io::Result<()> {
        let too_long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(data.len()).map_err(too_long)?;
        // With the NUL that ends it.
        let name_size = u32::try_from(name.len() + 1).map_err(too_long)?;
        // Inode numbers only tell hard links apart.
        self.entries += 1;
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.entries, // c_ino
            mode,
            0, // c_uid
            0, // c_gid
            links,
            0, // c_mtime
            size,
            0, // c_maj
            0, // c_min
            rmajor,
            rminor,
            name_size,
            0, // c_chksum
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Header with name, and data, are each padded to four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> io::Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Name, mode, device and data.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// An independent reading of the format.
    fn read(bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let digits = &bytes[at + 6 + 8 * n..at + 14 + 8 * n];
                u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
            };
            let name_end = at + 110 + field(11) as usize;
            let name = std::str::from_utf8(&bytes[at + 110..name_end - 1]).unwrap();
            let data = name_end.next_multiple_of(4);
            let end = data + field(6) as usize;
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), end);
                return entries;
            }
            let device = (field(9), field(10));
            entries.push((name.to_owned(), field(1), device, bytes[data..end].to_vec()));
            at = end.next_multiple_of(4);
        }
    }

    #[test]
    fn everything_is_in_it_and_it_is_always_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let os = Os::new();
        let (agent, a, b) = (
            dir.path().join("agent"),
            dir.path().join("zeta.ko"),
            dir.path().join("alpha.ko"),
        );
        fs::write(&agent, "the agent").unwrap();
        fs::write(&a, "z").unwrap();
        fs::write(&b, "").unwrap();
        let content = Initramfs {
            agent,
            modules: vec![a.clone(), b],
        };
        let (one, two) = (dir.path().join("1.cpio"), dir.path().join("2.cpio"));
        write_initramfs(&os, &content, &one).unwrap();
        write_initramfs(&os, &content, &two).unwrap();
        let bytes = fs::read(&one).unwrap();
        assert_eq!(bytes, fs::read(&two).unwrap());
        let plain = |name: &str, mode, data: &str| {
            (name.to_owned(), mode, (0, 0), data.as_bytes().to_vec())
        };
        assert_eq!(
            read(&bytes),
            [
                plain("dev", 0o040_755, ""),
                plain("modules", 0o040_755, ""),
                plain("proc", 0o040_755, ""),
                plain("sys", 0o040_755, ""),
                ("dev/console".to_owned(), 0o020_600, (5, 1), Vec::new()),
                plain("init", 0o100_755, "the agent"),
                plain("modules/zeta.ko", 0o100_644, "z"),
                plain("modules/alpha.ko", 0o100_644, ""),
                plain("modules/order", 0o100_644, "zeta.ko\nalpha.ko\n"),
            ]
        );

        let twice = Initramfs {
            modules: vec![a.clone(), a],
            ..content.clone()
        };
        let error = write_initramfs(&os, &twice, &one).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::AlreadyExists);
        let gone = Initramfs {
            agent: dir.path().join("none"),
            ..content
        };
        let error = write_initramfs(&os, &gone, &one).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound);
        assert_eq!(bytes, fs::read(&one).unwrap());
    }
}
