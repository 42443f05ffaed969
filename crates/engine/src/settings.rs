//! What the owner of a data directory may set, in `config.toml` there. A face reads the file; here is
//! what it means.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use smolvm_host::net::alloc::{AddressPool, PortRange};

use crate::error::{Error, ErrorKind, Result};

/// The file's name in the data directory.
pub const SETTINGS_NAME: &str = "config.toml";

/// Settings, each with its default where the file does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The table `[ssh]`.
    pub ssh: SshSettings,
    /// The table `[network]`.
    pub network: NetworkSettings,
    /// The table `[registries]`.
    pub registries: RegistryTable,
    /// The table `[jail]`.
    pub jail: JailSettings,
}

/// The table `[ssh]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SshSettings {
    /// `ports`: ports of the host at which sandboxes serve SSH; `2200-2999` if not set.
    #[serde(with = "as_text")]
    pub ports: PortRange,
}

/// The table `[network]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkSettings {
    /// `prefix`: addresses of guests; `172.16.0.0/24` if not set.
    #[serde(with = "as_text")]
    pub prefix: AddressPool,
}

/// The table `[registries]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct RegistryTable {
    /// `mirrors`: for a registry's name the hosts or URLs to ask before it.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// `plain-http`: registries that may be asked without encryption.
    pub plain_http: Vec<String>,
    /// `authorities`: files of certificates, in PEM, to believe beside those of this host. A relative path is
    /// one in the data directory.
    pub authorities: Vec<PathBuf>,
}

/// The table `[jail]`: how Firecracker is locked in, where root starts it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JailSettings {
    /// `jailer`: `on` if not set.
    pub jailer: JailerChoice,
    /// `users`: numbers of users and groups that nobody else has; `2000000-2065535` if not set.
    #[serde(with = "as_text")]
    pub users: UserRange,
}

/// Whether Firecracker is locked in where root starts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JailerChoice {
    /// It is, or it is not started.
    #[default]
    On,
    /// It runs as root, with nothing around it but its own filters of system calls.
    Off,
}

/// Numbers of users, from one to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
    last: u32,
}

impl UserRange {
    /// The last number that can be a user's: the one after it means none (setuid(2)).
    const LAST: u32 = u32::MAX - 1;

    /// The first.
    #[must_use]
    pub fn first(&self) -> u32 {
        self.first
    }

    /// The last.
    #[must_use]
    pub fn last(&self) -> u32 {
        self.last
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        u64::from(self.last - self.first) + 1
    }

    /// Every number once, beginning at one that `seed` chooses and wrapping around.
    pub(crate) fn candidates(&self, seed: u64) -> impl Iterator<Item = u32> + use<> {
        let (first, count) = (self.first, self.count());
        let begin = seed % count;
        (0..count).map(move |step| {
            let offset = (begin + step) % count;
            first + u32::try_from(offset).expect("less than the range has")
        })
    }
}

impl Default for UserRange {
    fn default() -> Self {
        Self {
            first: 2_000_000,
            last: 2_065_535,
        }
    }
}

impl std::str::FromStr for UserRange {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text
            .split_once('-')
            .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
        match numbers {
            Some((first, last)) if 0 < first && first <= last && last <= Self::LAST => {
                Ok(Self { first, last })
            }
            _ => Err(format!(
                "`{text}` is no range of users such as `2000000-2065535`"
            )),
        }
    }
}

impl std::fmt::Display for UserRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Settings {
    /// Reads the text of `path`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] if it is no TOML (toml.io/en/v1.0.0), has a key that is not known,
    /// or a value that cannot be. The place in the text is in the cause.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            // Of several lines that draw the place, for a terminal; the first names it.
            let drawn = error.to_string();
            let place = drawn.lines().next().unwrap_or_default();
            let why = format!("{place}: {}", error.message());
            Error::new(
                ErrorKind::InvalidInput,
                format!("could not read the settings in {}", path.display()),
            )
            .because(why)
            .hint("the keys are `ports` in `[ssh]`, such as \"2200-2999\", `prefix` in `[network]`, such as \"172.16.0.0/24\", `mirrors`, `plain-http` and `authorities` in `[registries]`, and `jailer` and `users` in `[jail]`, such as \"off\" and \"2000000-2065535\"")
        })
    }
}

/// Values that are written as their own text.
pub(crate) mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings> {
        Settings::parse(text, Path::new("/d/config.toml"))
    }

    #[test]
    fn what_is_not_set_has_its_default() {
        assert_eq!(parse("").expect("nothing"), Settings::default());
        let settings = parse("[ssh]\nports = \"3000-3001\"\n").expect("settings");
        assert_eq!(settings.ssh.ports.to_string(), "3000-3001");
        assert_eq!(settings.network.prefix.to_string(), "172.16.0.0/24");
        let settings = parse("network.prefix = '10.9.0.0/16'").expect("settings");
        assert_eq!(settings.network.prefix.guests(), 65_533);
        let settings = parse(
            "[registries]\nplain-http = ['r.lan:5000']\nauthorities = ['own.pem']\n\
             mirrors.'docker.io' = ['https://m.lan/x', 'n.lan']\n",
        )
        .expect("settings");
        let table = &settings.registries;
        assert_eq!(table.mirrors["docker.io"], ["https://m.lan/x", "n.lan"]);
        assert_eq!(table.plain_http, ["r.lan:5000"]);
        assert_eq!(table.authorities, [Path::new("own.pem")]);
        let settings = parse("[jail]\njailer = \"off\"\nusers = \"5-7\"").expect("settings");
        assert_eq!(settings.jail.jailer, JailerChoice::Off);
        let users: Vec<_> = settings.jail.users.candidates(4).collect();
        assert_eq!(users, [6, 7, 5]);
        // As they are handed to a process that fills a pool.
        let text = serde_json::to_string(&settings).expect("written");
        let read: Settings = serde_json::from_str(&text).expect("read");
        assert_eq!(read, settings);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (text, why) in [
            (
                "[ssh]\nport = 1",
                "TOML parse error at line 2, column 1: unknown field `port`, expected `ports`",
            ),
            (
                "[sshd]",
                "TOML parse error at line 1, column 2: unknown field `sshd`, expected one of `ssh`, `network`, `registries`, `jail`",
            ),
            (
                "[ssh]\nports = \"2999-2200\"",
                "TOML parse error at line 2, column 9: `2999-2200` is no range of ports such as `2200-2999`",
            ),
            (
                "[network]\nprefix = \"127.0.0.0/8\"",
                "TOML parse error at line 2, column 10: `127.0.0.0/8` is no pool: it holds loopback, \
                 link-local, multicast or reserved addresses",
            ),
            (
                "[jail]\nusers = \"0-5\"",
                "TOML parse error at line 2, column 9: `0-5` is no range of users such as `2000000-2065535`",
            ),
            (
                "[ssh]\nports = 2200",
                "TOML parse error at line 2, column 9: invalid type: integer `2200`, expected a string",
            ),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert_eq!(
                error.in_one_line(),
                format!("could not read the settings in /d/config.toml: {why}")
            );
            assert!(error.hint_text().is_some());
        }
        assert!(parse("= what").is_err());
    }
}
