//! The agent's part of the kernel command line.

/// What the host decided about this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BootOptions {
    /// Device with the read-only base.
    pub(crate) root: String,
    /// Its file system.
    pub(crate) rootfs: String,
    /// Where changes go.
    pub(crate) upper: Upper,
    /// Port of the host at which it waits for the agent; the virtio port if absent.
    pub(crate) vsock: Option<u32>,
    /// Whether each step is timed on the console.
    pub(crate) debug: bool,
}

/// Where changes to the root file system go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Upper {
    /// To this device, which holds an ext4 file system.
    Device(String),
    /// To memory.
    Memory,
}

/// Why a command line does not say how to boot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CmdlineError {
    /// A setting is missing.
    #[error("the kernel command line has no {0}=")]
    Missing(&'static str),
    /// A setting has a value that makes no sense.
    #[error("the kernel command line has {name}={value}; {expected} was expected")]
    Invalid {
        name: &'static str,
        value: String,
        expected: &'static str,
    },
}

/// Reads the command line. Words that are not ours belong to the kernel.
pub(crate) fn parse(text: &str) -> Result<BootOptions, CmdlineError> {
    let value = |name: &'static str| {
        text.split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .next_back()
            .map(str::to_owned)
            .ok_or(CmdlineError::Missing(name))
    };
    let invalid = |name, value, expected| CmdlineError::Invalid {
        name,
        value,
        expected,
    };
    let root = value("smolvm.root")?;
    if !root.starts_with("/dev/") {
        return Err(invalid("smolvm.root", root, "a path below /dev"));
    }
    let rootfs = value("smolvm.rootfs")?;
    if !matches!(rootfs.as_str(), "erofs" | "ext4") {
        return Err(invalid("smolvm.rootfs", rootfs, "erofs or ext4"));
    }
    let upper = match value("smolvm.upper")? {
        memory if memory == "tmpfs" => Upper::Memory,
        device if device.starts_with("/dev/") => Upper::Device(device),
        other => {
            return Err(invalid("smolvm.upper", other, "tmpfs or a path below /dev"));
        }
    };
    let vsock = match value("smolvm.vsock") {
        Ok(port) => match port.parse() {
            Ok(number) => Some(number),
            Err(_) => return Err(invalid("smolvm.vsock", port, "a port number")),
        },
        Err(_) => None,
    };
    Ok(BootOptions {
        root,
        rootfs,
        upper,
        vsock,
        debug: text
            .split_ascii_whitespace()
            .any(|word| word == "smolvm.debug"),
    })
}

/// The modules to load, in order, from the list the host packed.
pub(crate) fn module_order(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_words_are_found_among_the_kernels() {
        let line =
            "quiet panic=-1 smolvm.root=/dev/vda smolvm.rootfs=erofs smolvm.upper=/dev/vdb\n";
        assert_eq!(
            parse(line),
            Ok(BootOptions {
                root: "/dev/vda".to_owned(),
                rootfs: "erofs".to_owned(),
                upper: Upper::Device("/dev/vdb".to_owned()),
                vsock: None,
                debug: false,
            })
        );
        let line = "smolvm.debug smolvm.vsock=1024 smolvm.rootfs=ext4 smolvm.root=/dev/vda \
                    smolvm.upper=tmpfs";
        let options = parse(line).expect("complete");
        assert_eq!(options.vsock, Some(1024));
        assert_eq!(options.upper, Upper::Memory);
        assert!(options.debug);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let line = "smolvm.root=/dev/vda smolvm.rootfs=erofs smolvm.upper=tmpfs smolvm.vsock=x";
        assert_eq!(
            parse(line).expect_err("no number").to_string(),
            "the kernel command line has smolvm.vsock=x; a port number was expected"
        );
        assert_eq!(
            parse("quiet").expect_err("empty").to_string(),
            "the kernel command line has no smolvm.root="
        );
        assert_eq!(
            parse("smolvm.root=/dev/vda smolvm.rootfs=xfs smolvm.upper=tmpfs")
                .expect_err("unknown file system")
                .to_string(),
            "the kernel command line has smolvm.rootfs=xfs; erofs or ext4 was expected"
        );
        assert!(parse("smolvm.root=vda smolvm.rootfs=erofs smolvm.upper=tmpfs").is_err());
        assert!(parse("smolvm.root=/dev/vda smolvm.rootfs=erofs smolvm.upper=yes").is_err());
    }

    #[test]
    fn modules_come_in_the_order_of_the_list() {
        let order: Vec<&str> = module_order("virtio.ko\n\n# ring\nvirtio_ring.ko \n").collect();
        assert_eq!(order, ["virtio.ko", "virtio_ring.ko"]);
    }
}
