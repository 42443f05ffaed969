//! HTTP to whatever is downloaded from: one agent, whose every wait ends when the operation is cancelled.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use ureq::http::{Response, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Body, Proxy, ProxyProtocol};

use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::packages::Programs;

/// Most time to be connected.
const CONNECT: Duration = Duration::from_secs(30);
/// Most time without a byte, in either direction.
const SILENCE: Duration = Duration::from_secs(60);
/// Where distributions keep the certificates of authorities, as curl and Go look for them.
const AUTHORITIES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The proxy to use, as the variables of those names say it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProxySettings {
    /// `https_proxy`, or `all_proxy`.
    pub https: Option<String>,
    /// `no_proxy`.
    pub none_for: Option<String>,
}

/// An agent. Dropping it ends its connections.
#[derive(Debug)]
pub(crate) struct Http {
    pub(crate) agent: Agent,
    /// Ends the thread that waits for the cancellation.
    over: OwnedFd,
    watcher: Option<JoinHandle<()>>,
    cancel: Cancel,
}

impl Http {
    pub(crate) fn new(
        programs: &Programs,
        proxy: &ProxySettings,
        own_authorities: &[PathBuf],
        cancel: &Cancel,
    ) -> Result<Self, HostError> {
        let io = |doing| {
            move |error: std::io::Error| HostError::io(doing, Path::new("downloads"), error)
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .user_agent(concat!("smolvm/", env!("CARGO_PKG_VERSION")))
            .tls_config(
                TlsConfig::builder()
                    .root_certs(authorities(own_authorities)?)
                    .build(),
            )
            .proxy(proxy.parse()?)
            .build();
        let resolver = HostResolver {
            programs: programs.clone(),
            cancel: cancel.clone(),
        };
        let agent = Agent::with_parts(config, DefaultConnector::new(), resolver);
        let over =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| io("prepare")(error.into()))?;
        let watcher = std::thread::Builder::new().name("cancel".to_owned());
        let watcher = {
            let (agent, cancel) = (agent.clone(), cancel.clone());
            let over = over.try_clone().map_err(io("prepare"))?;
            watcher.spawn(move || {
                let mut fds = [
                    PollFd::from_borrowed_fd(cancel.event(), PollFlags::IN),
                    PollFd::new(&over, PollFlags::IN),
                ];
                let _ = rustix::io::retry_on_intr(|| poll(&mut fds, None));
                agent.shutdown();
            })
        };
        Ok(Self {
            agent,
            over,
            watcher: Some(watcher.map_err(io("prepare"))?),
            cancel: cancel.clone(),
        })
    }

    /// Waits, unless it is cancelled.
    pub(crate) fn pause(&self, time: Duration, what: &str) -> Result<(), HostError> {
        let time = Timespec::try_from(time).ok();
        let mut fds = [PollFd::from_borrowed_fd(self.cancel.event(), PollFlags::IN)];
        let _ = rustix::io::retry_on_intr(|| poll(&mut fds, time.as_ref()));
        self.cancel.check("download", what)
    }

    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        let _ = rustix::io::write(self.over.as_fd(), &1_u64.to_ne_bytes());
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

impl ProxySettings {
    fn parse(&self) -> Result<Option<Proxy>, HostError> {
        let Some(text) = self.https.as_deref().filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        // A password in it is nothing to print.
        let shown = text.rsplit_once('@').map_or(text, |(_, host)| host);
        let hidden = || HostError::new(HostErrorKind::Other, "use the proxy", shown);
        let with_scheme = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let uri: Uri = with_scheme
            .parse()
            .map_err(|error| hidden().because(error))?;
        let protocol = match uri.scheme_str() {
            Some("http") => ProxyProtocol::Http,
            Some("https") => ProxyProtocol::Https,
            _ => return Err(hidden().because("only http and https proxies are known")),
        };
        let authority = uri
            .authority()
            .ok_or_else(|| hidden().because("it names no host"))?;
        let mut proxy = Proxy::builder(protocol).host(authority.host());
        if let Some(port) = authority.port_u16() {
            proxy = proxy.port(port);
        }
        if let Some((user, _)) = authority.as_str().rsplit_once('@') {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            proxy = proxy.username(user).password(password);
        }
        if let Some(expression) = &self.none_for {
            for part in expression.split(',').map(str::trim) {
                if !part.is_empty() {
                    proxy = proxy.no_proxy(part);
                }
            }
        }
        let proxy = proxy.build().map_err(|error| hidden().because(error))?;
        Ok(Some(proxy))
    }
}

/// The authorities this host trusts; those of Mozilla if it has none.
///
/// # Errors
///
/// For a file of the user's own that cannot be read, or has no certificate in it.
fn authorities(own: &[PathBuf]) -> Result<RootCerts, HostError> {
    let certificates = |text: &[u8]| -> Vec<Certificate<'static>> {
        parse_pem(text)
            .filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            })
            .collect()
    };
    let mut all = AUTHORITIES
        .iter()
        .filter_map(|path| std::fs::read(path).ok())
        .map(|text| certificates(&text))
        .find(|found| !found.is_empty())
        .unwrap_or_default();
    if own.is_empty() && all.is_empty() {
        return Ok(RootCerts::WebPki);
    }
    for path in own {
        let doing = "read the certificates of authorities";
        let text = std::fs::read(path).map_err(|error| HostError::io(doing, path, error))?;
        let found = certificates(&text);
        if found.is_empty() {
            return Err(
                HostError::new(HostErrorKind::Corrupt, doing, path.display().to_string())
                    .because("there is no certificate in it")
                    .hinting("It is to be a file of certificates in PEM."),
            );
        }
        all.extend(found);
    }
    Ok(RootCerts::new_with_certs(&all))
}

/// Looks names up as the host's own programs do: getent(1) asks whatever nsswitch.conf(5) names. A
/// program that is linked statically cannot load what that takes.
#[derive(Debug)]
struct HostResolver {
    programs: Programs,
    cancel: Cancel,
}

impl Resolver for HostResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let default = if uri.scheme_str() == Some("http") {
            80
        } else {
            443
        };
        let port = uri.port_u16().unwrap_or(default);
        let plain = host.trim_start_matches('[').trim_end_matches(']');
        let mut found = self.empty();
        let addresses: Vec<IpAddr> = match (plain.parse(), plain) {
            (Ok(address), _) => vec![address],
            (_, "localhost") => vec![[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()],
            _ => self.ask(plain)?,
        };
        for address in addresses.into_iter().take(16) {
            found.push(SocketAddr::new(address, port));
        }
        if found.is_empty() {
            return Err(ureq::Error::HostNotFound);
        }
        Ok(found)
    }
}

impl HostResolver {
    fn ask(&self, host: &str) -> Result<Vec<IpAddr>, ureq::Error> {
        let other = |error: HostError| ureq::Error::Other(Box::new(error));
        let tool = self.programs.tool("getent").map_err(other)?;
        match tool.args(["ahosts", host]).run(&self.cancel, &mut |_| {}) {
            Ok(text) => Ok(addresses(&String::from_utf8_lossy(&text))),
            Err(error) if error.kind() == HostErrorKind::Interrupted => Err(other(error)),
            // It ends with 2 for a name that nobody knows.
            Err(_) => Err(ureq::Error::HostNotFound),
        }
    }
}

/// `ADDRESS STREAM NAME`, and the same for each other kind of socket.
fn addresses(text: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let word = line.split_ascii_whitespace().next().unwrap_or_default();
        // A link-local address may have its interface behind it, which is of no use here.
        if let Ok(address) = word.parse()
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// A header as text.
pub(crate) fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// The first bytes of an answer.
pub(crate) fn read_some(response: Response<Body>, most: u64) -> Result<Vec<u8>, ureq::Error> {
    response
        .into_body()
        .into_with_config()
        .limit(most)
        .read_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_getent_prints_is_understood() {
        let text = "2001:db8::1     STREAM registry.example\n2001:db8::1     DGRAM\n\
                    fe80::1%eth0    STREAM\n192.0.2.7       STREAM\n\n";
        let found: Vec<_> = addresses(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["2001:db8::1", "192.0.2.7"]);
    }

    #[test]
    fn a_proxy_is_read_without_telling_its_password() {
        let settings = |text: &str| ProxySettings {
            https: Some(text.to_owned()),
            none_for: Some("localhost, .example".to_owned()),
        };
        let proxy = settings("http://me:secret@proxy.example:3128")
            .parse()
            .unwrap()
            .unwrap();
        assert_eq!((proxy.host(), proxy.port()), ("proxy.example", 3128));
        assert_eq!(proxy.username(), Some("me"));
        assert!(proxy.is_no_proxy(&"https://a.example/x".parse().unwrap()));
        assert!(!proxy.is_no_proxy(&"https://other.test/x".parse().unwrap()));
        assert!(settings("proxy.example:3128").parse().unwrap().is_some());
        assert!(settings("").parse().unwrap().is_none());
        let error = settings("ftp://me:secret@proxy.example")
            .parse()
            .unwrap_err();
        assert!(!format!("{error:?}").contains("secret"));
    }
}
