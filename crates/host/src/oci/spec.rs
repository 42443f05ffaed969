//! The descriptions an OCI image consists of, as far as they are used here ("Image Manifest", "Image
//! Index" and "Image Configuration" of the OCI image specification; Docker's are the same but for
//! names of media types).

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use super::digest::Digest;
use crate::error::{HostError, HostErrorKind};

/// Longest index, manifest or configuration that is read. Registries accept manifests of 4 MiB.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Most layers of an image. Docker makes 127 at most; others more.
const LAYERS_MAX: usize = 1024;
/// What environment and commands of an image may take together. A command with its environment has
/// to fit a request to the guest, and the user's own words have to fit beside them.
const WORDS_BYTES_MAX: usize = 32 * 1024;
/// What its labels and ports may take together.
const LABELS_BYTES_MAX: usize = 256 * 1024;

/// Points to content.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
}

impl Descriptor {
    /// In the place of one that is not known yet.
    pub(crate) fn nothing() -> Self {
        Self {
            media_type: String::new(),
            digest: Digest::of(b""),
            size: 0,
            annotations: None,
            platform: None,
        }
    }
}

/// What an image runs on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// As Go names it: `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// As Go names it: `linux`, …
    #[serde(default)]
    pub os: String,
    /// Of the architecture, such as `v8`.
    #[serde(default)]
    pub variant: Option<String>,
}

impl Platform {
    /// That of guests on this host.
    #[must_use]
    pub fn of_guests() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            variant: None,
        }
    }

    fn fits(&self, guests: &Self) -> bool {
        (&self.os, &self.architecture) == (&guests.os, &guests.architecture)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// An index or a manifest: which of them it is follows from what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    /// Manifests for several platforms, or of several images.
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// One image for one platform.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "schemaVersion", default)]
    schema_version: u32,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

pub(crate) fn corrupt(doing: &'static str, thing: impl Into<String>) -> HostError {
    HostError::new(HostErrorKind::Corrupt, doing, thing)
}

impl Document {
    /// Reads an index or a manifest. `what` names it in errors.
    pub(crate) fn parse(what: &str, bytes: &[u8]) -> Result<Self, HostError> {
        let wrong = || corrupt("read", what);
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| wrong().because(error))?;
        match raw {
            Raw {
                manifests: Some(manifests),
                config: None,
                layers: None,
                ..
            } => Ok(Self::Index(manifests)),
            Raw {
                manifests: None,
                config: Some(config),
                layers: Some(layers),
                ..
            } => {
                if layers.len() > LAYERS_MAX {
                    return Err(wrong().because(format!("it has more than {LAYERS_MAX} layers")));
                }
                Ok(Self::Manifest(Manifest { config, layers }))
            }
            Raw {
                schema_version: 1, ..
            } => Err(wrong().because(
                "it is a manifest of the first version, which Docker gave up in 2017 for want of digests",
            )),
            _ => Err(wrong().because("it is neither an index nor the manifest of an image")),
        }
    }
}

/// The manifest for guests of this platform.
pub(crate) fn choose<'m>(
    what: &str,
    manifests: &'m [Descriptor],
    guests: &Platform,
) -> Result<&'m Descriptor, HostError> {
    // One that says nothing of a platform is for whoever takes it.
    let fits = |one: &&Descriptor| {
        one.platform
            .as_ref()
            .is_none_or(|platform| platform.fits(guests))
    };
    manifests.iter().find(fits).ok_or_else(|| {
        let known: Vec<_> = manifests
            .iter()
            .filter_map(|one| one.platform.as_ref())
            // What build tools add to say how an image was made is for no platform.
            .filter(|platform| platform.os != "unknown")
            .map(ToString::to_string)
            .collect();
        HostError::new(HostErrorKind::NotFound, "find an image in", what).because(format!(
            "it has none for {guests}, only for {}",
            if known.is_empty() {
                "nothing".to_owned()
            } else {
                known.join(", ")
            }
        ))
    })
}

/// What an image says of the commands that are run in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    /// `USER`: name or number, with a group behind a colon.
    pub user: Option<String>,
    /// `WORKDIR`: absolute.
    pub workdir: Option<String>,
    /// `ENV`, in order, each name once.
    pub env: Vec<(String, String)>,
    /// `ENTRYPOINT`: what every command is an argument of.
    pub entrypoint: Vec<String>,
    /// `CMD`: what is run if no command is given.
    pub cmd: Vec<String>,
    /// `LABEL`, each name once. They say something to people and programs, and nothing here but
    /// [`WARMUP_LABEL`].
    pub labels: Vec<(String, String)>,
    /// `EXPOSE`, as `PORT/PROTOCOL`. They say what a program in the image may listen on, and publish
    /// nothing.
    pub ports: Vec<String>,
}

/// The label whose value is a command for a shell, to be run in a machine that others are to be copies
/// of.
pub const WARMUP_LABEL: &str = "smolvm.warmup";

impl ImageConfig {
    /// The command that warms a machine up, if there is one.
    #[must_use]
    pub fn warmup(&self) -> Option<&str> {
        let mut labels = self.labels.iter();
        labels
            .find(|(name, _)| name == WARMUP_LABEL)
            .map(|(_, command)| command.as_str())
    }
}

/// The file that describes an image's layers and its [`ImageConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConfigFile {
    pub(crate) config: ImageConfig,
    /// Digests of the layers as they are uncompressed, the lowest first.
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    config: Option<RawConfig>,
    rootfs: RawRootFs,
}

#[derive(Deserialize)]
struct RawRootFs {
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    user: Option<String>,
    working_dir: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    labels: Option<BTreeMap<String, String>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

impl ConfigFile {
    /// Reads an image's configuration, and checks that it can be used here. `what` names it in
    /// errors.
    pub(crate) fn parse(what: &str, bytes: &[u8], guests: &Platform) -> Result<Self, HostError> {
        let wrong = || corrupt("use the configuration of", what);
        let raw: RawConfigFile =
            serde_json::from_slice(bytes).map_err(|error| wrong().because(error))?;
        let platform = Platform {
            architecture: raw.architecture,
            os: raw.os,
            variant: None,
        };
        let unsaid = platform.architecture.is_empty() && platform.os.is_empty();
        if !unsaid && !platform.fits(guests) {
            return Err(
                HostError::new(HostErrorKind::NotFound, "use", what).because(format!(
                    "it is for {platform}, and guests here are {guests}"
                )),
            );
        }
        let diff_ids = raw.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() > LAYERS_MAX {
            return Err(wrong().because(format!("it has more than {LAYERS_MAX} layers")));
        }
        let raw = raw.config.unwrap_or_default();
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let mut config = ImageConfig {
            user: text(raw.user),
            workdir: text(raw.working_dir),
            env: Vec::new(),
            entrypoint: raw.entrypoint.unwrap_or_default(),
            cmd: raw.cmd.unwrap_or_default(),
            labels: raw.labels.unwrap_or_default().into_iter().collect(),
            ports: raw.exposed_ports.unwrap_or_default().into_keys().collect(),
        };
        if let Some(workdir) = &mut config.workdir
            && !workdir.starts_with('/')
        {
            workdir.insert(0, '/');
        }
        for variable in raw.env.unwrap_or_default() {
            // A name without a value means nothing where nobody passes a value on.
            let Some((name, value)) = variable.split_once('=') else {
                continue;
            };
            if name.is_empty() {
                return Err(wrong().because("it sets a variable that has no name"));
            }
            config.env.retain(|(known, _)| known != name);
            config.env.push((name.to_owned(), value.to_owned()));
        }
        let words = || {
            let env = config.env.iter().flat_map(|(name, value)| [name, value]);
            let argv = config.entrypoint.iter().chain(&config.cmd);
            let one = config.user.iter().chain(&config.workdir);
            env.chain(argv).chain(one)
        };
        if words().any(|word| word.contains('\0')) {
            return Err(wrong().because("it has a NUL byte in a word"));
        }
        if words().map(|word| word.len() + 16).sum::<usize>() > WORDS_BYTES_MAX {
            return Err(wrong().because(format!(
                "its environment and commands take more than {WORDS_BYTES_MAX} bytes"
            )));
        }
        let others = || {
            let labels = config.labels.iter();
            labels
                .flat_map(|(name, value)| [name, value])
                .chain(&config.ports)
        };
        if others().any(|word| word.contains('\0')) {
            return Err(wrong().because("it has a NUL byte in a label or port"));
        }
        if others().map(|word| word.len() + 16).sum::<usize>() > LABELS_BYTES_MAX {
            return Err(wrong().because(format!(
                "its labels and ports take more than {LABELS_BYTES_MAX} bytes"
            )));
        }
        Ok(Self { config, diff_ids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guests() -> Platform {
        Platform {
            architecture: "amd64".to_owned(),
            os: "linux".to_owned(),
            variant: None,
        }
    }

    fn config(text: &str) -> Result<ConfigFile, HostError> {
        ConfigFile::parse("an image", text.as_bytes(), &guests())
    }

    #[test]
    fn what_an_image_says_of_its_commands_is_read() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"User":"app:staff",
            "WorkingDir":"srv","Env":["A=1","PATH=/bin","ODD","A=x=y"],"Entrypoint":["/init"],
            "Cmd":["a","b"],"Labels":{"b":"2","smolvm.warmup":"true"},"ExposedPorts":{"80/tcp":{}}},
            "rootfs":{"type":"layers","diff_ids":[]}}"#;
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            config(text).unwrap().config,
            ImageConfig {
                user: Some("app:staff".to_owned()),
                workdir: Some("/srv".to_owned()),
                env: vec![pair("PATH", "/bin"), pair("A", "x=y")],
                entrypoint: vec!["/init".to_owned()],
                cmd: vec!["a".to_owned(), "b".to_owned()],
                labels: vec![pair("b", "2"), pair(WARMUP_LABEL, "true")],
                ports: vec!["80/tcp".to_owned()],
            }
        );
        assert_eq!(config(text).unwrap().config.warmup(), Some("true"));
        // Absent, null and empty are the same.
        for text in [
            r#"{"rootfs":{"diff_ids":null}}"#,
            r#"{"config":null,"rootfs":{}}"#,
            r#"{"config":{"User":"","WorkingDir":"","Env":null,"Cmd":null},"rootfs":{}}"#,
        ] {
            assert_eq!(config(text).unwrap().config, ImageConfig::default());
        }
    }

    #[test]
    fn configurations_of_no_use_are_refused() {
        let long = "x".repeat(WORDS_BYTES_MAX);
        for (text, cause) in [
            ("", "EOF"),
            ("{}", "rootfs"),
            (
                r#"{"architecture":"arm64","os":"linux","rootfs":{}}"#,
                "linux/arm64",
            ),
            (
                r#"{"architecture":"amd64","os":"windows","rootfs":{}}"#,
                "windows/amd64",
            ),
            (r#"{"config":{"Env":["=x"]},"rootfs":{}}"#, "has no name"),
            (r#"{"config":{"Cmd":["a\u0000"]},"rootfs":{}}"#, "NUL"),
            (r#"{"config":{"Labels":{"a":"\u0000"}},"rootfs":{}}"#, "NUL"),
            (
                &format!(r#"{{"config":{{"Cmd":["{long}"]}},"rootfs":{{}}}}"#),
                "more than",
            ),
            (
                r#"{"rootfs":{"diff_ids":["sha256:../../etc/passwd"]}}"#,
                "not `sha256:`",
            ),
        ] {
            let error = config(text).unwrap_err();
            let cause_text = error.into_source().unwrap().to_string();
            assert!(cause_text.contains(cause), "{cause}: {cause_text}");
        }
    }

    #[test]
    fn the_manifest_for_guests_is_chosen() {
        let digest = Digest::of(b"");
        let one = |os: &str, architecture: &str, variant: &str| {
            format!(
                r#"{{"mediaType":"m","digest":"{digest}","size":1,"platform":
                {{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}}}"#
            )
        };
        let index = |ones: &[String]| {
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, ones.join(","));
            match Document::parse("an index", text.as_bytes()).unwrap() {
                Document::Index(manifests) => manifests,
                other => panic!("{other:?}"),
            }
        };
        let all = index(&[
            one("linux", "arm64", "v8"),
            one("linux", "amd64", ""),
            one("unknown", "unknown", ""),
        ]);
        let chosen = choose("it", &all, &guests()).unwrap();
        assert_eq!(chosen.platform.as_ref().unwrap().architecture, "amd64");
        let none = index(&[one("linux", "arm64", "v8"), one("unknown", "unknown", "")]);
        let error = choose("it", &none, &guests()).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound);
        let cause = error.into_source().unwrap().to_string();
        assert_eq!(
            cause,
            "it has none for linux/amd64, only for linux/arm64/v8"
        );
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"schemaVersion":1,"fsLayers":[]}"#,
            r#"{"manifests":[{"digest":"sha256:0","size":1}]}"#,
            r#"{"manifests":[],"config":{},"layers":[]}"#,
        ] {
            let error = Document::parse("it", text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), HostErrorKind::Corrupt, "{text}");
        }
    }
}
