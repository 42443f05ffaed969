//! Who we are to a registry: what `docker login` and `podman login` have left on this host, and the
//! tokens registries give for it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::cancel::Cancel;
use crate::oci::reference::DEFAULT_REGISTRY;
use crate::packages::Programs;

/// How Docker's files call its own registry.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";

/// A name and what proves it.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// A token that other tokens are given for.
    Identity(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never what they are.
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// The header for HTTP's basic authentication.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { user, password } => Some(format!(
                "Basic {}",
                STANDARD.encode(format!("{user}:{password}"))
            )),
            Self::Identity(_) => None,
        }
    }
}

/// `config.json` of Docker, `auth.json` of Podman.
#[derive(Debug, Default, Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
    #[serde(rename = "credHelpers", default)]
    helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl std::fmt::Debug for AuthEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthEntry")
    }
}

impl AuthEntry {
    fn credentials(&self) -> Option<Credentials> {
        if let Some(token) = self
            .identitytoken
            .as_ref()
            .filter(|token| !token.is_empty())
        {
            return Some(Credentials::Identity(token.clone()));
        }
        let pair = match (&self.username, &self.password) {
            (Some(user), Some(password)) => Some((user.clone(), password.clone())),
            _ => {
                let auth = self.auth.as_ref().filter(|auth| !auth.is_empty())?;
                let text = String::from_utf8(STANDARD.decode(auth.trim()).ok()?).ok()?;
                let (user, password) = text.split_once(':')?;
                // Docker pads some with NUL.
                Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
            }
        };
        let (user, password) = pair?;
        Some(Credentials::Password { user, password })
    }
}

/// What a helper answers (docker-credential-helpers).
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// Keys under which credentials for a repository of a registry may stand, the best first: Podman's
/// files may name a repository or a part of it.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = format!("{registry}/{repository}");
    loop {
        keys.push(path.clone());
        match path.rfind('/') {
            Some(slash) => path.truncate(slash),
            None => break,
        }
    }
    keys.push(format!("https://{registry}"));
    keys.push(format!("https://{registry}/"));
    keys.push(format!("https://{registry}/v1/"));
    keys.push(format!("https://{registry}/v2/"));
    if registry == DEFAULT_REGISTRY {
        keys.push(DOCKER_KEY.to_owned());
        keys.push("index.docker.io".to_owned());
    }
    keys
}

/// Finds the credentials for a repository in the first of the files that has some. A file that is not
/// there has none; one that makes no sense is passed over with a warning.
pub(super) fn find(
    files: &[PathBuf],
    programs: &Programs,
    registry: &str,
    repository: &str,
    cancel: &Cancel,
) -> Option<Credentials> {
    let keys = keys(registry, repository);
    for path in files {
        let Ok(text) = std::fs::read(path) else {
            continue;
        };
        let file: AuthFile = match serde_json::from_slice(&text) {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "credentials are not read");
                continue;
            }
        };
        let helper = keys.iter().find_map(|key| file.helpers.get(key));
        if let Some(helper) = helper.or(file.store.as_ref()) {
            let server = match registry {
                DEFAULT_REGISTRY => DOCKER_KEY,
                other => other,
            };
            if let Some(found) = ask(helper, server, programs, cancel) {
                return Some(found);
            }
        }
        let mut entries = keys.iter().filter_map(|key| file.auths.get(key));
        if let Some(found) = entries.find_map(AuthEntry::credentials) {
            return Some(found);
        }
    }
    None
}

/// Asks a helper program, which says so if it has nothing.
fn ask(helper: &str, server: &str, programs: &Programs, cancel: &Cancel) -> Option<Credentials> {
    let tool = programs.tool(&format!("docker-credential-{helper}"));
    let answer = tool.and_then(|tool| {
        tool.arg("get")
            .input(server.as_bytes())?
            .run(cancel, &mut |_| {})
    });
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            tracing::debug!(%error, helper, "no credentials from the helper");
            return None;
        }
    };
    let helped: Helped = serde_json::from_slice(&answer).ok()?;
    Some(match helped.username.as_str() {
        "<token>" => Credentials::Identity(helped.secret),
        _ => Credentials::Password {
            user: helped.username,
            password: helped.secret,
        },
    })
}

/// How a registry wants to know who asks: `WWW-Authenticate` (RFC 9110, section 11.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// The first one that is understood.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let parameters = parameters(rest);
        let get = |name: &str| {
            let mut found = parameters
                .iter()
                .filter(|(key, _)| key.eq_ignore_ascii_case(name));
            found.next().map(|(_, value)| value.clone())
        };
        Some(Self::Bearer {
            realm: get("realm")?,
            service: get("service"),
            scope: get("scope"),
        })
    }
}

/// `name="value"` or `name=value`, with commas between.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text.trim();
    while let Some((name, value)) = rest.split_once('=') {
        let value = value.trim_start();
        let mut text = String::new();
        let after = if let Some(quoted) = value.strip_prefix('"') {
            let mut escaped = false;
            let mut end = quoted.len();
            for (at, c) in quoted.char_indices() {
                match c {
                    c if escaped => {
                        text.push(c);
                        escaped = false;
                    }
                    '\\' => escaped = true,
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    c => text.push(c),
                }
            }
            &quoted[end..]
        } else {
            let end = value.find(',').unwrap_or(value.len());
            text.push_str(value[..end].trim());
            &value[end..]
        };
        found.push((name.trim().to_owned(), text));
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    found
}

/// What a token server answers.
#[derive(Deserialize)]
pub(super) struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Token {
    pub(super) fn header(self) -> Option<String> {
        let token = self.token.or(self.access_token)?;
        (!token.is_empty()).then(|| format!("Bearer {token}"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn challenges_are_read() {
        let text = r#"Bearer realm="https://auth.example/token",service="a, \"b\"",scope="repository:x:pull,push""#;
        assert_eq!(
            Challenge::parse(text),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".to_owned(),
                service: Some("a, \"b\"".to_owned()),
                scope: Some("repository:x:pull,push".to_owned()),
            })
        );
        let bare = Challenge::parse("bearer realm=https://x/t , service=y");
        assert_eq!(
            bare,
            Some(Challenge::Bearer {
                realm: "https://x/t".to_owned(),
                service: Some("y".to_owned()),
                scope: None,
            })
        );
        assert_eq!(
            Challenge::parse("Basic realm=\"x\""),
            Some(Challenge::Basic)
        );
        for odd in [
            "",
            "Digest realm=x",
            "Bearer",
            "Bearer service=x",
            "Bearer realm",
        ] {
            assert_eq!(Challenge::parse(odd), None, "{odd}");
        }
        assert!(Challenge::parse("Bearer realm=\"x").is_some());
    }

    #[test]
    fn credentials_are_found_where_docker_and_podman_keep_them() {
        let dir = tempfile::tempdir().unwrap();
        let password = |user: &str, password: &str| {
            Some(Credentials::Password {
                user: user.to_owned(),
                password: password.to_owned(),
            })
        };
        let auth = STANDARD.encode("ada:pass:word");
        let docker = dir.path().join("config.json");
        fs::write(
            &docker,
            format!(
                r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}},"ghcr.io":{{}},
                "token.example":{{"identitytoken":"t"}}}},
                "credHelpers":{{"helped.example":"test"}}}}"#
            ),
        )
        .unwrap();
        let podman = dir.path().join("auth.json");
        fs::write(
            &podman,
            r#"{"auths":{"quay.io/ns/own":{"username":"own","password":"1"},
            "quay.io":{"username":"all","password":"2"}}}"#,
        )
        .unwrap();
        let helper = dir.path().join("docker-credential-test");
        fs::write(
            &helper,
            "#!/bin/sh\nread -r server\n[ \"$1 $server\" = 'get helped.example' ] || exit 1\n\
             echo '{\"ServerURL\":\"x\",\"Username\":\"h\",\"Secret\":\"s\"}'\n",
        )
        .unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        let broken = dir.path().join("broken.json");
        fs::write(&broken, "{").unwrap();
        let files = [dir.path().join("none"), broken, docker, podman];
        let programs = Programs::new([dir.path().to_owned()]);
        let cancel = Cancel::new().unwrap();
        let find = |registry: &str, repository: &str| {
            super::find(&files, &programs, registry, repository, &cancel)
        };
        assert_eq!(find("docker.io", "library/x"), password("ada", "pass:word"));
        assert_eq!(find("quay.io", "ns/own"), password("own", "1"));
        assert_eq!(find("quay.io", "ns/own/sub"), password("own", "1"));
        assert_eq!(find("quay.io", "ns/other"), password("all", "2"));
        assert_eq!(find("helped.example", "x"), password("h", "s"));
        assert_eq!(
            find("token.example", "x"),
            Some(Credentials::Identity("t".to_owned()))
        );
        assert_eq!(find("ghcr.io", "x"), None);
        assert_eq!(find("evil-quay.io", "x"), None);
        assert!(!format!("{:?}", find("quay.io", "x")).contains('2'));
    }
}
