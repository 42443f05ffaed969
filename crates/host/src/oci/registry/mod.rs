//! Pulling from a registry: the OCI distribution specification, and Docker's tokens.
//!
//! A [`Remote`] is an image that was found: its manifest and configuration, checked against their
//! digests. [`Remote::fetch`] brings a layer to a file, going on where an earlier attempt ended,
//! whoever made it.

mod auth;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use serde::Deserialize;
use ureq::Body;
use ureq::http::{Response, StatusCode};

use self::auth::{Challenge, Credentials, Token};
use super::digest::{Digest, Hashing};
use super::reference::{DEFAULT_REGISTRY, Reference};
use super::spec::{
    ConfigFile, DOCUMENT_BYTES_MAX, Descriptor, Document, ImageConfig, Manifest, Platform, choose,
    corrupt,
};
use super::unpack::Layer;
use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
pub use crate::http::ProxySettings;
use crate::http::{Http, header, read_some};
use crate::os::Os;
use crate::packages::Programs;

/// The host that serves the default registry.
const DEFAULT_HOST: &str = "registry-1.docker.io";
/// The kinds of manifest that are understood.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";
/// Attempts in a row that bring nothing before a download is given up.
const ATTEMPTS: u32 = 5;
/// Time before the second attempt; doubled before each further one.
const PAUSE: Duration = Duration::from_millis(250);
/// Bytes of an answer that says what went wrong.
const COMPLAINT_BYTES_MAX: u64 = 64 * 1024;
/// Bytes of a token server's answer.
const TOKEN_BYTES_MAX: u64 = 1 << 20;

/// How to reach registries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RegistrySettings {
    /// Files with credentials, as Docker and Podman write them; the first that has some counts.
    pub auth_files: Vec<PathBuf>,
    /// Hosts or URLs to ask before a registry itself, by the registry's name.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Registries that may be asked without encryption. Those of this host always may.
    pub plain_http: Vec<String>,
    /// Files of certificates of authorities to believe beside those of this host, in PEM.
    pub authorities: Vec<PathBuf>,
    /// The proxy for everything but this host.
    pub proxy: ProxySettings,
}

/// One place that has a registry's images.
#[derive(Debug)]
struct Endpoint {
    /// `https://host` or `http://host`, with a path before `/v2/` if a mirror's URL has one.
    base: String,
    /// The name under which credentials for it are kept.
    registry: String,
    credentials: Option<Credentials>,
    /// What was found to be accepted.
    authorization: Mutex<Option<String>>,
}

/// An image in a registry.
#[derive(Debug)]
pub struct Remote {
    http: Http,
    endpoint: Endpoint,
    repository: String,
    /// What errors call it.
    what: String,
    /// Digest of the index, or of the manifest if there is no index: what `NAME@DIGEST` names.
    pub digest: Digest,
    /// What it says of its commands.
    pub config: ImageConfig,
    manifest: Manifest,
    diff_ids: Vec<Digest>,
}

/// A layer of a [`Remote`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteLayer {
    /// Digest of its bytes.
    pub digest: Digest,
    /// How many they are.
    pub size: u64,
    /// Digest of the uncompressed bytes.
    diff_id: Digest,
}

impl RemoteLayer {
    /// Name of the file that [`Remote::fetch`] brings it to. Until it is whole the file has the
    /// extension `partial`.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("sha256-{}", self.digest.hex())
    }

    /// The layer to unpack, from the file it was brought to.
    #[must_use]
    pub fn layer(self, file: File) -> Layer<'static> {
        Layer {
            open: Box::new(move || Ok(Box::new(file))),
            what: self.digest.to_string(),
            digest: Some(self.digest),
            size: self.size,
            diff_id: self.diff_id,
        }
    }
}

impl Remote {
    /// Finds an image for guests of this platform.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound) if there is no such image, or none for the platform;
    /// [`PermissionDenied`](HostErrorKind::PermissionDenied) if the registry wants credentials or
    /// refuses those it got, or would have to be asked without encryption;
    /// [`Network`](HostErrorKind::Network); [`Corrupt`](HostErrorKind::Corrupt) if something is not
    /// what its digest says; [`Interrupted`](HostErrorKind::Interrupted).
    pub fn find(
        reference: &Reference,
        guests: &Platform,
        settings: &RegistrySettings,
        programs: &Programs,
        cancel: &Cancel,
    ) -> Result<Self, HostError> {
        let mut http = Http::new(programs, &settings.proxy, &settings.authorities, cancel)?;
        let mut failure = None;
        let registry = reference.registry();
        let mirrors = settings.mirrors.get(registry).into_iter().flatten();
        let places = mirrors.map(String::as_str).chain([registry]);
        for place in places {
            let found = Endpoint::new(place, reference, settings, programs, &http)
                .and_then(|endpoint| Self::find_at(endpoint, reference, guests, http));
            match found {
                Ok(remote) => return Ok(remote),
                Err(error) => {
                    cancel.check("pull", &reference.to_string())?;
                    if place != registry {
                        tracing::info!(mirror = place, %error, "a mirror does not have it");
                    }
                    failure = Some(error);
                    http = Http::new(programs, &settings.proxy, &settings.authorities, cancel)?;
                }
            }
        }
        Err(failure.expect("the registry itself was asked"))
    }

    fn find_at(
        endpoint: Endpoint,
        reference: &Reference,
        guests: &Platform,
        http: Http,
    ) -> Result<Self, HostError> {
        let mut remote = Self {
            http,
            endpoint,
            repository: reference.repository().to_owned(),
            what: reference.to_string(),
            digest: Digest::of(b""),
            config: ImageConfig::default(),
            manifest: Manifest {
                config: Descriptor::nothing(),
                layers: Vec::new(),
            },
            diff_ids: Vec::new(),
        };
        let wanted = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => unreachable!("a reference has a tag or a digest"),
        };
        let (digest, document) = remote.manifest(&wanted, reference.digest())?;
        remote.digest = digest;
        let manifest = match document {
            Document::Manifest(manifest) => manifest,
            Document::Index(manifests) => {
                let chosen = choose(&remote.what, &manifests, guests)?.digest;
                match remote.manifest(&chosen.to_string(), Some(chosen))?.1 {
                    Document::Manifest(manifest) => manifest,
                    Document::Index(_) => {
                        return Err(corrupt("use", remote.what).because("an index is in its index"));
                    }
                }
            }
        };
        let bytes = remote.document(&manifest.config)?;
        let config = ConfigFile::parse(&remote.what, &bytes, guests)?;
        if config.diff_ids.len() != manifest.layers.len() {
            return Err(corrupt("use", remote.what).because(format!(
                "its manifest has {} layers, and its configuration {}",
                manifest.layers.len(),
                config.diff_ids.len()
            )));
        }
        remote.manifest = manifest;
        remote.config = config.config;
        remote.diff_ids = config.diff_ids;
        Ok(remote)
    }

    /// Its layers, the lowest first.
    #[must_use]
    pub fn layers(&self) -> Vec<RemoteLayer> {
        let layers = self.manifest.layers.iter().zip(&self.diff_ids);
        layers
            .map(|(layer, diff_id)| RemoteLayer {
                digest: layer.digest,
                size: layer.size,
                diff_id: *diff_id,
            })
            .collect()
    }

    /// A manifest or an index by its tag or digest.
    fn manifest(
        &self,
        wanted: &str,
        expected: Option<Digest>,
    ) -> Result<(Digest, Document), HostError> {
        let url = self.url("manifests", wanted);
        let bytes = self.small(&url, Some(ACCEPT))?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(corrupt("pull", &self.what).because(format!(
                "the manifest {expected} that came has the digest {digest}"
            )));
        }
        Ok((digest, Document::parse(&self.what, &bytes)?))
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, HostError> {
        let url = self.url("blobs", &descriptor.digest.to_string());
        let bytes = self.small(&url, None)?;
        let digest = Digest::of(&bytes);
        if digest != descriptor.digest {
            return Err(corrupt("pull", &self.what).because(format!(
                "the configuration {} that came has the digest {digest}",
                descriptor.digest
            )));
        }
        Ok(bytes)
    }

    fn url(&self, kind: &str, name: &str) -> String {
        format!(
            "{}/v2/{}/{kind}/{name}",
            self.endpoint.base, self.repository
        )
    }

    /// Gets something that fits memory, trying again where that may help.
    fn small(&self, url: &str, accept: Option<&str>) -> Result<Vec<u8>, HostError> {
        let mut failed = 0;
        loop {
            let result = self.get(url, accept, None).and_then(|response| {
                read_some(response, DOCUMENT_BYTES_MAX).map_err(|error| match error {
                    ureq::Error::BodyExceedsLimit(_) => corrupt("pull", &self.what).because(
                        format!("an answer has more than {DOCUMENT_BYTES_MAX} bytes"),
                    ),
                    error => self.broken(error),
                })
            });
            match result {
                Err(error) if error.kind() == HostErrorKind::Network && is_passing(&error) => {
                    self.again(&mut failed, error)?;
                }
                other => return other,
            }
        }
    }

    /// Waits before another attempt; gives up after [`ATTEMPTS`].
    fn again(&self, failed: &mut u32, error: HostError) -> Result<(), HostError> {
        self.http.cancel().check("pull", &self.what)?;
        *failed += 1;
        if *failed == ATTEMPTS {
            return Err(error);
        }
        tracing::info!(%error, "trying again");
        self.http.pause(PAUSE * 2_u32.pow(*failed - 1), &self.what)
    }

    /// One request, with a new token if the registry wants one. Answers with success only.
    fn get(
        &self,
        url: &str,
        accept: Option<&str>,
        from: Option<u64>,
    ) -> Result<Response<Body>, HostError> {
        let mut authorized = false;
        loop {
            self.http.cancel().check("pull", &self.what)?;
            let mut request = self.http.agent.get(url);
            if let Some(accept) = accept {
                request = request.header("accept", accept);
            }
            if let Some(from) = from {
                request = request.header("range", format!("bytes={from}-"));
            }
            let authorization = self.endpoint.authorization.lock();
            let authorization = authorization.unwrap_or_else(|e| e.into_inner()).clone();
            if let Some(authorization) = &authorization {
                request = request.header("authorization", authorization);
            }
            let response = request.call().map_err(|error| self.broken(error))?;
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::UNAUTHORIZED if !authorized => {
                    authorized = true;
                    let header = header(&response, "www-authenticate").map(str::to_owned);
                    let Some(challenge) = header.as_deref().and_then(Challenge::parse) else {
                        return Err(self.refused(response));
                    };
                    let Some(new) = self.authorize(&challenge)? else {
                        return Err(self.refused(response));
                    };
                    let slot = self.endpoint.authorization.lock();
                    *slot.unwrap_or_else(|e| e.into_inner()) = Some(new);
                }
                _ => return Err(self.refused(response)),
            }
        }
    }

    /// What to answer a challenge with, if there is something.
    fn authorize(&self, challenge: &Challenge) -> Result<Option<String>, HostError> {
        let credentials = self.endpoint.credentials.as_ref();
        let Challenge::Bearer {
            realm,
            service,
            scope,
        } = challenge
        else {
            return Ok(credentials.and_then(Credentials::basic));
        };
        // Credentials go to whom the registry names, as with every client, but never in the clear.
        let secret = realm.starts_with("https://");
        let as_open = self.endpoint.base.starts_with("http://") && realm.starts_with("http://");
        if !secret && !as_open {
            return Err(self.denied(format!(
                "it sends us to {realm:?} for a token, without encryption"
            )));
        }
        let scope = match scope {
            Some(scope) => scope.clone(),
            None => format!("repository:{}:pull", self.repository),
        };
        let service = service.as_deref().unwrap_or_default();
        let response = if let Some(Credentials::Identity(token)) = credentials {
            self.http.agent.post(realm).send_form([
                ("grant_type", "refresh_token"),
                ("service", service),
                ("scope", &scope),
                ("client_id", "smolvm"),
                ("refresh_token", token),
            ])
        } else {
            let mut request = self.http.agent.get(realm).query("scope", &scope);
            if !service.is_empty() {
                request = request.query("service", service);
            }
            if let Some(basic) = credentials.and_then(Credentials::basic) {
                request = request.header("authorization", basic);
            }
            request.call()
        };
        let response = response.map_err(|error| self.broken(error))?;
        if response.status() != StatusCode::OK {
            return Err(self.refused(response));
        }
        let bytes = read_some(response, TOKEN_BYTES_MAX).map_err(|error| self.broken(error))?;
        let token: Token =
            serde_json::from_slice(&bytes).map_err(|error| self.network().because(error))?;
        Ok(token.header())
    }

    fn network(&self) -> HostError {
        HostError::new(HostErrorKind::Network, "pull", &self.what)
    }

    fn denied(&self, why: impl Into<String>) -> HostError {
        HostError::new(HostErrorKind::PermissionDenied, "pull", &self.what).because(why.into())
    }

    /// A connection that could not be made, or broke.
    fn broken(&self, error: ureq::Error) -> HostError {
        if self.http.cancel().is_cancelled() {
            return HostError::new(HostErrorKind::Interrupted, "pull", &self.what)
                .because("it was cancelled");
        }
        let passing = matches!(
            error,
            ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed
        );
        let host = self.endpoint.base.rsplit("//").next().unwrap_or_default();
        let cause = format!("asking {host}: {error}");
        match passing {
            true => self.network().because(Passing(cause)),
            false => self.network().because(cause),
        }
    }

    /// An answer that is none, with what the registry says of it.
    fn refused(&self, response: Response<Body>) -> HostError {
        let status = response.status();
        let text = read_some(response, COMPLAINT_BYTES_MAX).unwrap_or_default();
        let said = complaint(&text);
        let why = match said {
            Some(said) => format!("the registry answers {status}: {said}"),
            None => format!("the registry answers {status}"),
        };
        let login = || {
            format!(
                "Log in with `docker login {0}` or `podman login {0}`, whose credentials are used.",
                self.endpoint.registry
            )
        };
        match status {
            StatusCode::NOT_FOUND => {
                HostError::new(HostErrorKind::NotFound, "pull", &self.what).because(why)
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let error = self.denied(why);
                match self.endpoint.credentials {
                    // Some registries say so of what is not there.
                    None => error.hinting(format!(
                        "Look whether the name is right. If the image is private: {}",
                        login()
                    )),
                    Some(_) => error.hinting(format!(
                        "The credentials on this host do not do. {}",
                        login()
                    )),
                }
            }
            StatusCode::TOO_MANY_REQUESTS => self.network().because(why).hinting(format!(
                "The registry lets no more pulls pass for now. Wait, or be known to it. {}",
                login()
            )),
            status if status.is_server_error() => self.network().because(Passing(why)),
            _ => self.network().because(why),
        }
    }

    /// Brings a layer to `DIR/sha256-HEX` and opens it. What an earlier attempt has left there is
    /// gone on with; what another process brings at this moment is waited for. `progress` is told
    /// how many bytes of it are there.
    ///
    /// # Errors
    ///
    /// As [`Remote::find`], and [`NoSpace`](HostErrorKind::NoSpace). What came so far stays, except
    /// after [`Corrupt`](HostErrorKind::Corrupt).
    pub fn fetch(
        &self,
        os: &Os,
        layer: &RemoteLayer,
        dir: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<File, HostError> {
        let place = dir.join(layer.file_name());
        let partial = place.with_extension("partial");
        let open = |path: &Path| match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HostError::io("open", path, error)),
        };
        if let Some(file) = open(&place)? {
            progress(layer.size);
            return Ok(file);
        }
        let lock = os.lock("lock the file for the layer", &partial)?;
        // Whoever had it may have put the layer in its place.
        if let Some(file) = open(&place)? {
            os.remove_file("remove the file for a layer that is there", &partial)?;
            progress(layer.size);
            return Ok(file);
        }
        let file = File::from(OwnedFd::from(lock));
        let mut download = Download {
            remote: self,
            os,
            layer,
            file,
            partial: &partial,
        };
        match download.run(progress) {
            Ok(()) => {}
            Err(error) => {
                if error.kind() == HostErrorKind::Corrupt {
                    os.remove_file("remove what is not the layer", &partial)?;
                }
                return Err(error);
            }
        }
        os.effect("keep the layer", &partial, || download.file.sync_all())?;
        os.rename("put the layer in place at", &partial, &place)?;
        // Opened anew: the other has the lock and a position.
        open(&place)?.ok_or_else(|| {
            HostError::new(HostErrorKind::NotFound, "open", place.display().to_string())
        })
    }
}

/// A layer on its way to a file that we have locked.
struct Download<'a> {
    remote: &'a Remote,
    os: &'a Os,
    layer: &'a RemoteLayer,
    file: File,
    partial: &'a Path,
}

impl Download<'_> {
    fn run(&mut self, progress: &mut dyn FnMut(u64)) -> Result<(), HostError> {
        let begun = self.length()?;
        match self.complete(progress) {
            // A power failure may have left anything there.
            Err(error) if error.kind() == HostErrorKind::Corrupt && begun > 0 => {
                tracing::info!(%error, "what an earlier attempt left is of no use");
                self.cut()?;
                self.complete(progress)
            }
            other => other,
        }
    }

    fn length(&self) -> Result<u64, HostError> {
        let status = self.file.metadata();
        Ok(status
            .map_err(|error| HostError::io("look at", self.partial, error))?
            .len())
    }

    fn cut(&mut self) -> Result<(), HostError> {
        self.os.effect("begin the layer anew", self.partial, || {
            self.file.set_len(0)
        })
    }

    /// Brings what is missing, and checks the whole.
    fn complete(&mut self, progress: &mut dyn FnMut(u64)) -> Result<(), HostError> {
        let size = self.layer.size;
        if self.length()? > size {
            self.cut()?;
        }
        let mut failed = 0;
        loop {
            let before = self.length()?;
            progress(before);
            if before == size {
                break;
            }
            match self.part(before, progress) {
                Ok(()) => {}
                Err(error) if error.kind() == HostErrorKind::Network && is_passing(&error) => {
                    if self.length()? > before {
                        failed = 0;
                    }
                    self.remote.again(&mut failed, error)?;
                }
                Err(error) => return Err(error),
            }
        }
        let found = self.os.effect("read the layer", self.partial, || {
            self.file.seek(SeekFrom::Start(0))?;
            Ok(Hashing::new(&self.file, u64::MAX).finish()?.1)
        })?;
        if found != self.layer.digest {
            return Err(corrupt("pull", &self.remote.what).because(format!(
                "the layer {} that came has the digest {found}",
                self.layer.digest
            )));
        }
        Ok(())
    }

    /// One request's worth, from this byte on.
    fn part(&mut self, from: u64, progress: &mut dyn FnMut(u64)) -> Result<(), HostError> {
        let remote = self.remote;
        let url = remote.url("blobs", &self.layer.digest.to_string());
        let response = remote.get(&url, None, (from > 0).then_some(from))?;
        let mut at = from;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            // A server may ignore that only a part is wanted.
            at = 0;
        } else if !header(&response, "content-range")
            .is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
        {
            return Err(remote
                .network()
                .because("the registry sends another part than was asked for"));
        }
        self.os.effect("write the layer to", self.partial, || {
            self.file.set_len(at)?;
            self.file.seek(SeekFrom::Start(at)).map(drop)
        })?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 17];
        loop {
            remote.http.cancel().check("pull", &remote.what)?;
            let n = match body.read(&mut buffer) {
                Ok(n) => n,
                Err(error) => return Err(remote.broken(error.into())),
            };
            if n == 0 {
                break;
            }
            at += n as u64;
            if at > self.layer.size {
                return Err(corrupt("pull", &remote.what).because(format!(
                    "the layer {} has more than the {} bytes its manifest says",
                    self.layer.digest, self.layer.size
                )));
            }
            self.os.effect("write the layer to", self.partial, || {
                self.file.write_all(&buffer[..n])
            })?;
            progress(at);
        }
        if at < self.layer.size {
            return Err(remote
                .network()
                .because(Passing("the connection ended too early".to_owned())));
        }
        Ok(())
    }
}

/// A cause that may be gone a moment later.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Passing(String);

fn is_passing(error: &HostError) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<Passing>())
}

/// What a registry says went wrong, without what a terminal would act on.
fn complaint(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Complaints {
        errors: Option<Vec<Complaint>>,
        details: Option<String>,
    }
    #[derive(Deserialize)]
    struct Complaint {
        message: Option<String>,
        code: Option<String>,
    }
    let complaints: Complaints = serde_json::from_slice(text).ok()?;
    let first = complaints.errors.unwrap_or_default().into_iter().next();
    let said = first
        .and_then(|one| one.message.filter(|text| !text.is_empty()).or(one.code))
        .or(complaints.details)?;
    Some(
        said.chars()
            .take(300)
            .flat_map(char::escape_debug)
            .collect(),
    )
}

impl Endpoint {
    /// `place` is a registry's name, or a mirror's name or URL.
    fn new(
        place: &str,
        reference: &Reference,
        settings: &RegistrySettings,
        programs: &Programs,
        http: &Http,
    ) -> Result<Self, HostError> {
        let (scheme, rest) = match place.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest.trim_end_matches('/')),
            None => (None, place),
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) => (host, format!("/{path}")),
            None => (rest, String::new()),
        };
        let registry = host.to_owned();
        let may_be_open = is_loopback(host) || settings.plain_http.iter().any(|one| one == host);
        let denied = || HostError::new(HostErrorKind::PermissionDenied, "ask", place);
        let base = match scheme {
            Some("https") => format!("https://{host}{path}"),
            Some("http") if may_be_open => format!("http://{host}{path}"),
            Some("http") => {
                return Err(denied()
                    .because("it would be asked without encryption")
                    .hinting(format!(
                        "If you trust the network to it, add `--plain-http {host}`."
                    )));
            }
            Some(_) => return Err(denied().because("only https and http are known")),
            None if host == DEFAULT_REGISTRY => format!("https://{DEFAULT_HOST}"),
            None if may_be_open && speaks_http(host, http) => format!("http://{host}"),
            None => format!("https://{host}"),
        };
        let repository = reference.repository();
        let credentials = auth::find(
            &settings.auth_files,
            programs,
            &registry,
            repository,
            http.cancel(),
        );
        Ok(Self {
            base,
            registry,
            credentials,
            authorization: Mutex::new(None),
        })
    }
}

/// Whether it answers without encryption. One that wants it answers with something else, or nothing.
fn speaks_http(host: &str, http: &Http) -> bool {
    match http.agent.get(format!("http://{host}/v2/")).call() {
        Ok(response) => matches!(
            response.status(),
            StatusCode::OK | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
        ),
        Err(_) => false,
    }
}

/// Whether it is this host, to which nothing leaves it.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests;
