//! Names of images, as Docker writes and completes them.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;

/// The registry that is meant where none is named.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag that is meant where none is named.
const DEFAULT_TAG: &str = "latest";
/// Where the default registry keeps images without an owner.
const OFFICIAL: &str = "library";
/// Longest repository with its registry, and longest tag ("Pulling manifests" of the OCI distribution
/// specification).
const REPOSITORY_CHARS_MAX: usize = 255;
const TAG_CHARS_MAX: usize = 128;

/// Where an image is: registry, repository, and tag or digest.
///
/// `python` is `docker.io/library/python:latest`, `me/app:1` is `docker.io/me/app:1`; the first part
/// is a registry if it has a dot or a port, or is `localhost`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What is no name of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not the name of an image", .0.escape_debug())]
pub struct ReferenceError(String);

impl Reference {
    /// The registry's host, with its port if one is given.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `None` if only a digest is given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest, if one is given. It is what counts then.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Complete: `docker.io/library/python:latest`.
    #[must_use]
    pub fn canonical(&self) -> String {
        self.with(&format!("{}/{}", self.registry, self.repository))
    }

    fn with(&self, repository: &str) -> String {
        let mut text = repository.to_owned();
        if let Some(tag) = &self.tag {
            text = format!("{text}:{tag}");
        }
        if let Some(digest) = &self.digest {
            text = format!("{text}@{digest}");
        }
        text
    }
}

/// As people write it: without the default registry and its official part, with the tag.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let repository = if self.registry == DEFAULT_REGISTRY {
            let official = self.repository.strip_prefix("library/");
            official.unwrap_or(&self.repository).to_owned()
        } else {
            format!("{}/{}", self.registry, self.repository)
        };
        f.write_str(&self.with(&repository))
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse(text).ok_or_else(|| ReferenceError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Reference> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse().ok()?)),
        None => (text, None),
    };
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[last..].find(':') {
        Some(colon) => (&rest[..last + colon], Some(&rest[last + colon + 1..])),
        None => (rest, None),
    };
    let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost";
    let (registry, repository) = match name.split_once('/') {
        Some((host, repository)) if is_host(host) => (host, repository.to_owned()),
        Some(_) => (DEFAULT_REGISTRY, name.to_owned()),
        None => (DEFAULT_REGISTRY, format!("{OFFICIAL}/{name}")),
    };
    // Another name Docker has for its own.
    let registry = match registry {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
        other => other,
    };
    let repository = match repository.as_str() {
        one if registry == DEFAULT_REGISTRY && !one.contains('/') => format!("{OFFICIAL}/{one}"),
        _ => repository,
    };
    let fits = registry.len() + 1 + repository.len() <= REPOSITORY_CHARS_MAX;
    if !fits || !is_registry(registry) || !repository.split('/').all(is_component) {
        return None;
    }
    let tag = tag.or(digest.is_none().then_some(DEFAULT_TAG));
    if !tag.is_none_or(is_tag) {
        return None;
    }
    Some(Reference {
        registry: registry.to_owned(),
        repository,
        tag: tag.map(str::to_owned),
        digest,
    })
}

/// A host's name or address, with a port behind it or not.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            (
                "localhost",
                port.strip_prefix(':').or((!port.is_empty()).then_some("")),
            )
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(label)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Lower-case letters and digits, with `.`, `_`, `__` or any number of `-` between them.
fn is_component(text: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut between = String::new();
    let separates = |between: &str| {
        matches!(between, "" | "." | "_" | "__") || between.chars().all(|c| c == '-')
    };
    for c in text.chars() {
        if word(c) {
            if !separates(&between) {
                return false;
            }
            between.clear();
        } else if matches!(c, '.' | '_' | '-') {
            between.push(c);
        } else {
            return false;
        }
    }
    text.starts_with(word) && text.ends_with(word)
}

fn is_tag(text: &str) -> bool {
    (1..=TAG_CHARS_MAX).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        && !text.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        let digest = Digest::of(b"");
        for (text, canonical, familiar) in [
            ("python", "docker.io/library/python:latest", "python:latest"),
            (
                "python:3.12-slim",
                "docker.io/library/python:3.12-slim",
                "python:3.12-slim",
            ),
            ("me/app:1", "docker.io/me/app:1", "me/app:1"),
            (
                "docker.io/python",
                "docker.io/library/python:latest",
                "python:latest",
            ),
            (
                "index.docker.io/me/app",
                "docker.io/me/app:latest",
                "me/app:latest",
            ),
            ("ghcr.io/a/b/c:V2", "ghcr.io/a/b/c:V2", "ghcr.io/a/b/c:V2"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            (
                "localhost:5000/x:1",
                "localhost:5000/x:1",
                "localhost:5000/x:1",
            ),
            (
                "127.0.0.1:5000/x",
                "127.0.0.1:5000/x:latest",
                "127.0.0.1:5000/x:latest",
            ),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
            (
                "a__b--c.d_e",
                "docker.io/library/a__b--c.d_e:latest",
                "a__b--c.d_e:latest",
            ),
        ] {
            let reference: Reference = text.parse().expect(text);
            assert_eq!(reference.canonical(), canonical);
            assert_eq!(reference.to_string(), familiar);
            assert_eq!(canonical.parse(), Ok(reference));
        }
        let by_digest: Reference = format!("x@{digest}").parse().unwrap();
        assert_eq!((by_digest.tag(), by_digest.digest()), (None, Some(digest)));
        assert_eq!(by_digest.to_string(), format!("x@{digest}"));
        let both: Reference = format!("x:1@{digest}").parse().unwrap();
        assert_eq!((both.tag(), both.digest()), (Some("1"), Some(digest)));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "x".repeat(250);
        let long_tag = format!("x:{}", "t".repeat(129));
        for bad in [
            "",
            ":",
            "a:",
            ":a",
            "A",
            "-a",
            "a-",
            ".",
            "..",
            "a b",
            "a//b",
            "/a",
            "a/",
            "a/../b",
            "a:.b",
            "a:b:c",
            "a@",
            "a@sha256:0",
            "a..b",
            "a___b",
            "a._b",
            "\u{e9}",
            "a\n",
            "x.y:0/a",
            "x.y:99999/a",
            "x.y:z/a",
            "-x.y/a",
            "[::g]/a",
            "[::1]x/a",
            "http://x.y/a",
            "x.y/",
            &long,
            &long_tag,
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
