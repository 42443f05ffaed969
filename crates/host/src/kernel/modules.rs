//! Which modules to load, and in which order.
//!
//! Debian's package has no `modules.dep`, since depmod(8) writes that when it is installed. So the
//! dependencies are read where depmod reads them: in the `.modinfo` section of each module, lines
//! of `key=value` ended by NUL (`include/linux/moduleinfo.h`).

use std::collections::{BTreeMap, BTreeSet};

/// What a module says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ModInfo {
    pub(super) name: String,
    depends: Vec<String>,
    /// Names or aliases of what should be loaded before, `softdep=pre: ...`; modprobe.d(5).
    soft: Vec<String>,
    aliases: Vec<String>,
}

/// `-` and `_` are the same in a module's name; the kernel itself says `_`.
pub(super) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads the `.modinfo` section of an ELF file of 64 bits, little-endian; elf(5).
pub(super) fn mod_info(elf: &[u8]) -> Option<ModInfo> {
    let section = section(elf, b".modinfo")?;
    let mut info = ModInfo::default();
    for line in section.split(|b| *b == 0) {
        let Some((key, value)) = std::str::from_utf8(line)
            .ok()
            .and_then(|l| l.split_once('='))
        else {
            continue;
        };
        info.add(key, value);
    }
    (!info.name.is_empty()).then_some(info)
}

impl ModInfo {
    fn add(&mut self, key: &str, value: &str) {
        match key {
            "name" => self.name = normal(value),
            "depends" => {
                let names = value.split(',').filter(|d| !d.is_empty());
                self.depends.extend(names.map(normal));
            }
            "softdep" => {
                let mut before = false;
                for word in value.split_ascii_whitespace() {
                    match word {
                        "pre:" => before = true,
                        "post:" => before = false,
                        name if before => self.soft.push(name.to_owned()),
                        _ => {}
                    }
                }
            }
            "alias" => self.aliases.push(value.to_owned()),
            _ => {}
        }
    }
}

fn section<'e>(elf: &'e [u8], wanted: &[u8]) -> Option<&'e [u8]> {
    // ELFCLASS64, ELFDATA2LSB.
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let number = |at: usize, length: usize| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(elf.get(at..at.checked_add(length)?)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let (table, entry) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(entry)?);
    let content = |index: usize| {
        let at = header(index)?;
        let (offset, size) = (
            number(at.checked_add(0x18)?, 8)?,
            number(at.checked_add(0x20)?, 8)?,
        );
        elf.get(offset..offset.checked_add(size)?)
    };
    let names = content(names)?;
    (0..count).find_map(|index| {
        let name = names.get(number(header(index)?, 4)?..)?;
        (name.strip_prefix(wanted)?.first() == Some(&0)).then(|| content(index))?
    })
}

/// What a kernel has built in, from `modules.builtin` (paths) and `modules.builtin.modinfo`
/// (`<module>.<key>=<value>`, NUL-ended).
#[derive(Debug, Default)]
pub(super) struct BuiltIn {
    names: BTreeSet<String>,
    aliases: BTreeSet<String>,
}

impl BuiltIn {
    pub(super) fn add_paths(&mut self, text: &[u8]) {
        for line in String::from_utf8_lossy(text).lines() {
            if let Some(name) = module_name(line) {
                self.names.insert(name);
            }
        }
    }

    pub(super) fn add_info(&mut self, text: &[u8]) {
        for line in text.split(|b| *b == 0) {
            let Some((key, value)) = std::str::from_utf8(line)
                .ok()
                .and_then(|l| l.split_once('='))
            else {
                continue;
            };
            if let Some((name, key)) = key.split_once('.') {
                self.names.insert(normal(name));
                if key == "alias" {
                    self.aliases.insert(value.to_owned());
                }
            }
        }
    }
}

/// The module's name in a path such as `kernel/fs/erofs/erofs.ko.xz`.
pub(super) fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, end) = file.split_once(".ko")?;
    matches!(end, "" | ".xz" | ".zst" | ".gz").then(|| normal(name))
}

/// A wanted module that the kernel neither has built in nor as a file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel has no module {0}")]
pub(super) struct NoModule(pub(super) String);

/// The wanted modules and all they need, each after what it needs; what is built in is left out.
/// Equal input gives the same order.
pub(super) fn load_order(
    wanted: &[&str],
    modules: &BTreeMap<String, ModInfo>,
    builtin: &BuiltIn,
) -> Result<Vec<String>, NoModule> {
    let mut walk = Walk {
        modules,
        builtin,
        seen: BTreeSet::new(),
        order: Vec::new(),
    };
    for name in wanted {
        walk.visit(&normal(name))?;
    }
    Ok(walk.order)
}

struct Walk<'a> {
    modules: &'a BTreeMap<String, ModInfo>,
    builtin: &'a BuiltIn,
    seen: BTreeSet<String>,
    order: Vec<String>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str) -> Result<(), NoModule> {
        if self.builtin.names.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let info = self
            .modules
            .get(name)
            .ok_or_else(|| NoModule(name.to_owned()))?;
        for soft in &info.soft {
            if let Some(found) = self.resolve(soft) {
                self.visit(&found)?;
            }
        }
        for needed in &info.depends {
            self.visit(needed)?;
        }
        self.order.push(name.to_owned());
        Ok(())
    }

    /// A soft dependency may name an alias, such as `crc32c` of `crc32c_generic`, and may be
    /// absent. Of several modules the portable one is taken: the others need CPU features that
    /// the guest's CPU may lack, and then refuse to load.
    fn resolve(&self, soft: &str) -> Option<String> {
        let name = normal(soft);
        if self.builtin.aliases.contains(soft) || self.builtin.names.contains(&name) {
            return None;
        }
        if self.modules.contains_key(&name) {
            return Some(name);
        }
        let mut candidates: Vec<_> = self
            .modules
            .values()
            .filter(|m| m.aliases.iter().any(|a| a == soft))
            .map(|m| &m.name)
            .collect();
        candidates.sort_by_key(|name| (!name.ends_with("generic"), name.as_str()));
        candidates.first().map(|name| (*name).clone())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The least ELF file with a `.modinfo` section.
    pub(crate) fn module(lines: &[&str]) -> Vec<u8> {
        let info = lines.join("\0") + "\0";
        let names = b"\0.shstrtab\0.modinfo\0";
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names_at = elf.len();
        elf.extend_from_slice(names);
        let info_at = elf.len();
        elf.extend_from_slice(info.as_bytes());
        let table = elf.len();
        for (name, at, length) in [
            (0, 0, 0),
            (1, names_at, names.len()),
            (11, info_at, info.len()),
        ] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&u32::to_le_bytes(name));
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a] = 64;
        elf[0x3c] = 3;
        elf[0x3e] = 1;
        elf
    }

    fn all(modules: &[&[&str]]) -> BTreeMap<String, ModInfo> {
        modules
            .iter()
            .map(|lines| mod_info(&module(lines)).unwrap())
            .map(|info| (info.name.clone(), info))
            .collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let modules = all(&[
            &["name=virtio_ring", "depends="],
            &["depends=virtio_ring", "name=virtio"],
            &["depends=virtio,virtio_ring", "name=virtio_blk"],
            &["depends=virtio_ring,virtio", "name=virtio_rng"],
            &["depends=libcrc32c", "name=erofs"],
            &[
                "softdep=pre: crc32c post: other",
                "depends=",
                "name=libcrc32c",
            ],
            &["alias=crc32c", "name=crc32c_intel", "depends="],
            &[
                "alias=crypto-crc32c",
                "alias=crc32c",
                "name=crc32c_generic",
                "depends=",
            ],
        ]);
        let mut builtin = BuiltIn::default();
        builtin.add_paths(b"kernel/fs/ext4/ext4.ko\n");
        let wanted = ["virtio_blk", "virtio-rng", "ext4", "erofs"];
        assert_eq!(
            load_order(&wanted, &modules, &builtin).unwrap(),
            [
                "virtio_ring",
                "virtio",
                "virtio_blk",
                "virtio_rng",
                "crc32c_generic",
                "libcrc32c",
                "erofs"
            ]
        );
        builtin.add_info(b"crc32c_generic.alias=crc32c\0x.license=GPL\0");
        assert_eq!(
            load_order(&["erofs"], &modules, &builtin).unwrap(),
            ["libcrc32c", "erofs"]
        );
        assert_eq!(
            load_order(&["overlay"], &modules, &builtin),
            Err(NoModule("overlay".to_owned()))
        );
    }

    #[test]
    fn names_are_read_from_paths() {
        for (path, name) in [
            ("./lib/modules/6/kernel/a/virtio-rng.ko", Some("virtio_rng")),
            ("x.ko.xz", Some("x")),
            ("x.ko.zst", Some("x")),
            ("x.koala", None),
            ("modules.dep", None),
        ] {
            assert_eq!(module_name(path).as_deref(), name);
        }
    }

    #[test]
    fn a_broken_module_has_no_info() {
        let whole = module(&["name=x"]);
        assert!(mod_info(&whole).is_some());
        // The last bytes of the last section's header say nothing that is read.
        for length in 0..whole.len() - 24 {
            assert!(mod_info(&whole[..length]).is_none());
        }
    }
}
