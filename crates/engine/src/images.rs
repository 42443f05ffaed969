//! The images on this host: their names, putting one in its place, and taking one away.
//!
//! A root file system lies in a directory named after its digest, which any number of names may
//! have. It is there as long as a name, a sandbox or a snapshot needs it. Whoever changes names or directories
//! holds the names' lock, for moments only; what takes long, such as reading a tar stream, is done
//! before, in a directory of its own (`.making-*`) that is locked by the process that fills it. So a
//! directory whose lock is free was left by a process that was killed, and the next one removes it.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use smolvm_host::cancel::Cancel;
use smolvm_host::image::{ImageManifest, ImportRequest, import_tar};
use smolvm_host::oci::{ImageConfig, Reference, ReferenceError};
use smolvm_host::os::{Lock, Os};

use crate::assets::{Assets, unknown_image};
use crate::engine::{Engine, ImageInfo, entries, random_u64, used_below};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ImageRow, Removal, Store, Users};

/// Directories that are being filled begin with this.
const MAKING: &str = ".making-";
/// Directories that nobody needs any more, and that are being removed.
const REMOVED: &str = ".removed-";
/// Root file systems begin with this, where the digest has a colon.
const DIGEST: &str = "sha256-";

/// The name of an image in the store.
///
/// It is one that Docker would take, [`Reference`]: `name`, `name:tag`, `owner/name:tag`,
/// `registry.example/owner/name:tag`. A name without a tag is a name of its own. Images that were
/// pulled or loaded have the name that `docker images` would show, with the tag.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName(String);

impl ImageName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&Reference> for ImageName {
    fn from(reference: &Reference) -> Self {
        Self(reference.to_string())
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let reference = reference(text)?;
        if reference.digest().is_some() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("`{text}` says what an image is, which is no name to give to one"),
            )
            .hint("leave out what begins at the `@`"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Reads what a user calls an image.
pub(crate) fn reference(text: &str) -> Result<Reference> {
    text.parse().map_err(|error: ReferenceError| {
        Error::new(ErrorKind::InvalidInput, error.to_string()).hint(
            "use lower-case letters, digits, `.`, `-` and `_`, beginning and ending with a letter or \
             digit; a tag may follow, as in `tools:v2`, and an owner or registry come before, as in \
             `registry.example/me/tools:v2`",
        )
    })
}

/// An image that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedImage {
    /// The name it had.
    pub name: String,
    /// Its digest, `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Bytes of the disk that are free now; 0 if another name has the same root file system.
    pub freed_bytes: u64,
}

impl From<ImageRow> for ImageInfo {
    fn from(image: ImageRow) -> Self {
        Self {
            name: image.name,
            digest: image.digest,
            size_bytes: image.size_bytes,
            created_at: image.created_at,
            source: image.source,
            manifest: image.manifest,
            config: image.config,
        }
    }
}

impl Engine {
    /// Removes an image with all it has on the disk, the shared disk of its sandboxes included.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] while a sandbox needs it.
    pub fn remove_image(&self, name: &str) -> Result<RemovedImage> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_image(name));
        };
        let assets = self.assets();
        let turn = assets.names_turn()?;
        let image = store.image(name)?.ok_or_else(|| unknown_image(name))?;
        match store.remove_image(&image.name)? {
            Removal::Done => {}
            Removal::Unknown => return Err(unknown_image(name)),
            Removal::UsedBy(users) => {
                let what = format!("image `{}`", image.name);
                return Err(in_use(&what, &image.name, &users));
            }
        }
        let place = self.layout().image(&image.digest);
        let before = used_below(&place);
        assets.sweep_images(&store, &turn)?;
        let freed_bytes = if place.exists() { 0 } else { before };
        drop(turn);
        if !store.digests_in_use()?.contains(&image.digest) {
            self.remove_templates_made_of(&image.digest)?;
        }
        Ok(RemovedImage {
            name: image.name,
            digest: image.digest,
            freed_bytes,
        })
    }
}

/// Says who uses a thing, and how to remove them. `pool` is the image of the pools among them.
pub(crate) fn in_use(what: &str, pool: &str, users: &Users) -> Error {
    let mut who = Vec::new();
    let mut how = Vec::new();
    let mut add = |one: &str, many: &str, names: &[String], command: &str| {
        if !names.is_empty() {
            let noun = if names.len() == 1 { one } else { many };
            who.push(format!("{noun} {}", short_list(names)));
            how.push(format!("`smolvm {command} {}`", names.join(" ")));
        }
    };
    add("sandbox", "sandboxes", &users.sandboxes, "rm");
    add("snapshot", "snapshots", &users.snapshots, "snapshot rm");
    if users.pools > 0 {
        let noun = if users.pools == 1 { "pool" } else { "pools" };
        who.push(format!("{} {noun}", users.pools));
        how.push(format!(
            "`smolvm pool rm {pool}` with the sizes that `smolvm pool ls` shows"
        ));
    }
    Error::new(
        ErrorKind::Busy,
        format!("{what} is used by {}", who.join(" and ")),
    )
    .hint(format!("delete what uses it first: {}", how.join(", ")))
}

/// The first of some names.
fn short_list(names: &[String]) -> String {
    const NAMED: usize = 3;
    let mut named: Vec<String> = names
        .iter()
        .take(NAMED)
        .map(|name| format!("`{name}`"))
        .collect();
    if names.len() > NAMED {
        named.push(format!("{} more", names.len() - NAMED));
    }
    named.join(", ")
}

/// The right to change names and directories of images. Held for moments.
#[derive(Debug)]
pub(crate) struct NamesTurn {
    _lock: Lock,
}

/// An image that is whole and has no name yet. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Staged {
    pub(crate) making: Making,
    pub(crate) manifest: ImageManifest,
    pub(crate) created_at: Timestamp,
    /// Digest of the manifest of an OCI image.
    pub(crate) oci: Option<String>,
    pub(crate) config: ImageConfig,
}

/// A directory to make an image in. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Making {
    os: Os,
    pub(crate) dir: PathBuf,
    /// Says that the process that fills it lives.
    _lock: Lock,
}

impl Drop for Making {
    fn drop(&mut self) {
        if let Err(error) = self
            .os
            .remove_tree("remove the directory the image was made in", &self.dir)
        {
            tracing::warn!(%error, dir = %self.dir.display(), "left for the next command");
        }
    }
}

/// What putting an image in its place came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) image: ImageRow,
    /// The digest the name had before, if it was another one.
    pub(crate) replaced: Option<String>,
}

impl Assets<'_> {
    /// Waits until nobody else changes names of images.
    pub(crate) fn names_turn(&self) -> Result<NamesTurn> {
        let images = self.layout.images();
        self.os.create_dir_all("make the directory", &images)?;
        let lock = self
            .os
            .lock("lock the names of images", &images.join("names.lock"))?;
        Ok(NamesTurn { _lock: lock })
    }

    /// Makes an image of a tar stream, up to the point where it only needs its name.
    pub(crate) fn stage_image(
        &self,
        tar: &mut dyn Read,
        name: &ImageName,
        source: &str,
        config: ImageConfig,
        cancel: &Cancel,
    ) -> Result<Staged> {
        let making = self.begin_making()?;
        let created_at = Timestamp::now();
        let image = import_tar(
            self.os,
            tar,
            &ImportRequest {
                name: name.as_str(),
                created: &created_at.to_string(),
                source,
                // An image is not a machine: it must not give all its machines one identity. An
                // empty file is filled at each birth (machine-id(5), "Relation to images").
                empty: &["etc/machine-id"],
            },
            &making.dir.join("image"),
            cancel,
        )?;
        Ok(Staged {
            making,
            manifest: image.manifest,
            created_at,
            oci: None,
            config,
        })
    }

    pub(crate) fn begin_making(&self) -> Result<Making> {
        let turn = self.names_turn()?;
        for dead in self.dead_makings(&turn)? {
            self.os.remove_tree("remove the half-made image", &dead)?;
        }
        let dir = self
            .layout
            .images()
            .join(format!("{MAKING}{:016x}", random_u64()?));
        self.os
            .create_dir("make the directory for the image", &dir)?;
        let locked = self.os.lock("lock the directory", &dir.join("lock"));
        match locked {
            Ok(lock) => Ok(Making {
                os: self.os.clone(),
                dir,
                _lock: lock,
            }),
            Err(error) => {
                self.os
                    .remove_tree("remove the directory the image was made in", &dir)?;
                Err(error.into())
            }
        }
    }

    /// What killed processes left half made. With the turn nobody is between making such a directory
    /// and locking it.
    fn dead_makings(&self, _turn: &NamesTurn) -> Result<Vec<PathBuf>> {
        let mut dead = Vec::new();
        for path in self.images_named(MAKING)? {
            // The lock goes at once: whoever sees the directory from now on has to wait for our turn.
            if self
                .os
                .try_lock("look at the lock", &path.join("lock"))?
                .is_some()
            {
                dead.push(path);
            }
        }
        Ok(dead)
    }

    fn images_named(&self, prefix: &str) -> Result<Vec<PathBuf>> {
        Ok(entries(&self.layout.images())?
            .into_iter()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
            .map(|entry| entry.path())
            .collect())
    }

    /// Gives a staged image its name, and with `replace` takes it from another.
    pub(crate) fn publish_image(
        &self,
        store: &mut Store,
        staged: Staged,
        name: &ImageName,
        replace: bool,
    ) -> Result<Published> {
        let turn = self.names_turn()?;
        let old = store.image_named(name.as_str())?;
        if old.is_some() && !replace {
            return Err(name_taken(name));
        }
        let Staged {
            making,
            manifest,
            created_at,
            oci,
            config,
        } = staged;
        let place = self.layout.image(&manifest.digest);
        let known = place.exists();
        if !known {
            self.os.rename(
                "put the image in place at",
                &making.dir.join("image"),
                &place,
            )?;
        }
        let image = ImageRow {
            name: name.to_string(),
            digest: manifest.digest,
            size_bytes: manifest.size,
            created_at,
            source: manifest.source,
            manifest: oci,
            config,
        };
        let recorded = self
            .os
            .sync("keep the image's place", &self.layout.images())
            .map_err(Error::from)
            .and_then(|()| store.put_image(&image));
        if let Err(error) = recorded {
            self.sweep_images(store, &turn)?;
            return Err(error);
        }
        drop(making);
        // What is left of an older image is no reason to say that the new one is not there.
        if let Err(error) = self.sweep_images(store, &turn) {
            tracing::warn!(%error, "could not remove what no image needs any more");
        }
        let replaced = old
            .map(|old| old.digest)
            .filter(|digest| *digest != image.digest);
        Ok(Published { image, replaced })
    }

    /// Everything below the directory of images that nobody needs: root file systems without a name
    /// or sandbox, and what killed processes left.
    pub(crate) fn unused_images(&self, store: &Store, turn: &NamesTurn) -> Result<Vec<PathBuf>> {
        let needed: Vec<PathBuf> = store
            .digests_in_use()?
            .iter()
            .map(|digest| self.layout.image(digest))
            .collect();
        let mut unused = self.images_named(DIGEST)?;
        unused.retain(|path| !needed.contains(path));
        unused.extend(self.images_named(REMOVED)?);
        unused.extend(self.dead_makings(turn)?);
        Ok(unused)
    }

    /// Removes [`Assets::unused_images`].
    pub(crate) fn sweep_images(&self, store: &Store, turn: &NamesTurn) -> Result<()> {
        for path in self.unused_images(store, turn)? {
            self.remove_unused_image(&path, turn)?;
        }
        Ok(())
    }

    /// Removes one of [`Assets::unused_images`].
    pub(crate) fn remove_unused_image(&self, path: &Path, _turn: &NamesTurn) -> Result<()> {
        // Away from its digest first: half a directory must never be found under it.
        let doomed = match path.file_name() {
            Some(name) if name.to_string_lossy().starts_with(DIGEST) => {
                let doomed = self
                    .layout
                    .images()
                    .join(format!("{REMOVED}{:016x}", random_u64()?));
                self.os.rename("take the image away to", path, &doomed)?;
                doomed
            }
            _ => path.to_owned(),
        };
        self.os.remove_tree("remove the image", &doomed)?;
        Ok(())
    }
}

/// The name belongs to another image.
pub(crate) fn name_taken(name: &ImageName) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!("an image named `{name}` exists already"),
    )
    .hint("choose another name, or add --force to replace it; sandboxes made from it keep what they have")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use smolvm_host::os::Faults;
    use smolvm_host::packages::Programs;

    use super::*;
    use crate::layout::Layout;
    use crate::store::rows::tests::row;

    #[test]
    fn names_are_checked() {
        for good in [
            "a",
            "my-image",
            "tools:V2_rc.1-x",
            "me/tools",
            "registry.example:5000/me/tools:1",
        ] {
            let name: ImageName = good.parse().expect(good);
            assert_eq!(name.as_str(), good);
        }
        let digest = format!("a@sha256:{}", "0".repeat(64));
        for bad in ["", "A", "a:b:c", "a\n", "../a", &digest] {
            let error = bad.parse::<ImageName>().expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn who_needs_an_image_is_told_with_what_helps() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let error = in_use(
            "image `tools:v1`",
            "tools:v1",
            &Users {
                sandboxes: names(&["a", "b", "c", "d", "e"]),
                snapshots: names(&["then"]),
                pools: 2,
            },
        );
        assert_eq!(
            error.to_string(),
            "image `tools:v1` is used by sandboxes `a`, `b`, `c`, 2 more and snapshot `then` and 2 pools"
        );
        assert_eq!(
            error.hint_text(),
            Some(
                "delete what uses it first: `smolvm rm a b c d e`, `smolvm snapshot rm then`, \
                 `smolvm pool rm tools:v1` with the sizes that `smolvm pool ls` shows"
            )
        );
    }

    struct Host {
        dir: tempfile::TempDir,
        layout: Layout,
        programs: Programs,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            Self {
                layout: Layout::new(dir.path().to_owned()),
                programs: Programs::new([]),
                dir,
            }
        }

        fn store(&self) -> Store {
            Store::open(&self.dir.path().join("state.db")).expect("a store")
        }

        fn assets<'a>(&'a self, os: &'a Os) -> Assets<'a> {
            Assets {
                os,
                layout: &self.layout,
                programs: &self.programs,
            }
        }

        /// Names in the directory of images, but for locks.
        fn files(&self) -> Vec<String> {
            let mut names: Vec<String> = entries(&self.layout.images())
                .expect("a list")
                .iter()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .filter(|name| !name.ends_with("lock"))
                .collect();
            names.sort();
            names
        }
    }

    fn name(text: &str) -> ImageName {
        text.parse().expect("a name")
    }

    fn tar(text: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, text) in [("file", text), ("etc/machine-id", "0123")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            builder
                .append_data(&mut header, path, text.as_bytes())
                .expect("memory");
        }
        builder.into_inner().expect("memory")
    }

    fn make(
        assets: &Assets<'_>,
        store: &mut Store,
        text: &str,
        image: &str,
        replace: bool,
    ) -> Result<Published> {
        let cancel = Cancel::new()?;
        let image = name(image);
        let staged = assets.stage_image(
            &mut tar(text).as_slice(),
            &image,
            "a test",
            ImageConfig::default(),
            &cancel,
        )?;
        assets.publish_image(store, staged, &image, replace)
    }

    fn dir_name(published: &Published) -> String {
        published.image.digest.replace(':', "-")
    }

    #[test]
    fn a_root_file_system_stays_as_long_as_a_name_or_sandbox_needs_it() {
        let host = Host::new();
        let (os, mut store) = (Os::new(), host.store());
        let assets = host.assets(&os);
        let one = make(&assets, &mut store, "one", "a", false).expect("made");
        // The same again under another name is kept once.
        let same = make(&assets, &mut store, "one", "b", false).expect("made");
        assert_eq!(same.image.digest, one.image.digest);
        assert_eq!(host.files(), [dir_name(&one)]);

        let error = make(&assets, &mut store, "two", "a", false).expect_err("taken");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(host.files(), [dir_name(&one)], "nothing of it is left");

        let two = make(&assets, &mut store, "two", "a", true).expect("replaced");
        assert_eq!(two.replaced.as_ref(), Some(&one.image.digest));
        let mut both = [dir_name(&one), dir_name(&two)];
        both.sort();
        assert_eq!(host.files(), both, "`b` needs the old one");

        let mut sandbox = row("box");
        sandbox.image_digest = one.image.digest.clone();
        store.insert_sandbox(&sandbox).expect("written");
        make(&assets, &mut store, "two", "b", true).expect("replaced");
        assert_eq!(host.files(), both, "the sandbox needs the old one");
        store.delete_sandbox(&sandbox.id).expect("deleted");
        let turn = assets.names_turn().expect("the turn");
        assets.sweep_images(&store, &turn).expect("swept");
        assert_eq!(host.files(), [dir_name(&two)]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_lives_is_not() {
        let host = Host::new();
        let (os, store) = (Os::new(), host.store());
        let assets = host.assets(&os);
        let living = assets.begin_making().expect("a directory");
        let images = host.layout.images();
        for dead in [
            ".making-dead",
            ".making-dead/.image.partial",
            ".removed-x",
            "sha256-0",
        ] {
            std::fs::create_dir(images.join(dead)).expect("a directory");
        }
        let other = assets.begin_making().expect("another");
        assert!(!images.join(".making-dead").exists(), "removed by the next");
        std::fs::create_dir(images.join(".making-dead")).expect("a directory");
        let turn = assets.names_turn().expect("the turn");
        assets.sweep_images(&store, &turn).expect("swept");
        let left = |making: &Making| {
            making
                .dir
                .file_name()
                .map(|n| n.to_string_lossy().into_owned())
        };
        let mut expected = vec![
            left(&living).expect("a name"),
            left(&other).expect("a name"),
        ];
        expected.sort();
        assert_eq!(host.files(), expected);
        drop((living, other));
        assert_eq!(host.files(), Vec::<String>::new());
    }

    #[derive(Debug)]
    struct Nth {
        nth: u32,
        seen: AtomicU32,
        forever: bool,
    }

    impl Faults for Nth {
        fn before(&self, _op: &'static str, _path: &Path) -> io::Result<()> {
            let now = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
            if now == self.nth || (self.forever && now > self.nth) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
    }

    #[test]
    fn whatever_effect_fails_the_old_image_stays_and_the_next_try_succeeds() {
        let mut failures = 0;
        for forever in [false, true] {
            for nth in 1.. {
                let host = Host::new();
                let (os, mut store) = (Os::new(), host.store());
                let old = make(&host.assets(&os), &mut store, "old", "a", false).expect("made");
                let faults = Arc::new(Nth {
                    nth,
                    seen: AtomicU32::new(0),
                    forever,
                });
                let faulty = Os::with_faults(Arc::<Nth>::clone(&faults));
                let outcome = make(&host.assets(&faulty), &mut store, "new", "a", true);
                let now = store.image("a").expect("read").expect("there").digest;
                let failed = outcome.is_err();
                match outcome {
                    Ok(new) => assert_eq!(now, new.image.digest),
                    Err(error) => {
                        failures += 1;
                        assert_eq!(error.kind(), ErrorKind::NoSpace, "{nth}: {error:?}");
                        assert_eq!(now, old.image.digest, "{nth}: the name moved on");
                    }
                }
                assert!(host.layout.image(&now).join("root.erofs").is_file());
                let new = make(&host.assets(&os), &mut store, "new", "a", true);
                let new = new.unwrap_or_else(|error| panic!("{nth}, second try: {error:?}"));
                assert_eq!(host.files(), [dir_name(&new)], "{nth}: left over");
                // More steps than there are: nothing failed, and nothing was left to a later sweep.
                if !failed && faults.seen.load(Ordering::Relaxed) < nth {
                    break;
                }
            }
        }
        assert!(failures > 20, "only {failures} steps failed");
    }
}
