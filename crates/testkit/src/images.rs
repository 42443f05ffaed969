//! OCI images that tests make, and a registry on this host to pull them from.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// What goes into a layer under one path.
#[derive(Debug, Clone)]
pub enum Entry {
    /// A file with its permission bits.
    File(Vec<u8>, u32),
    /// A directory.
    Directory,
    /// A symbolic link to this target.
    Symlink(String),
}

/// An image of layers and a configuration.
#[derive(Debug, Clone)]
pub struct TestImage {
    layers: Vec<Vec<u8>>,
    config: Value,
}

impl TestImage {
    /// An image with nothing in it, and this `config` ("Image Configuration" of the OCI image
    /// specification).
    #[must_use]
    pub fn new(config: Value) -> Self {
        Self {
            layers: Vec::new(),
            config,
        }
    }

    /// With one more layer.
    ///
    /// # Panics
    ///
    /// If a path cannot be in an archive.
    #[must_use]
    pub fn layer(mut self, entries: &[(&str, Entry)]) -> Self {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, entry) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mode(0o755);
            header.set_size(0);
            let added = match entry {
                Entry::File(bytes, mode) => {
                    header.set_mode(*mode);
                    header.set_size(bytes.len() as u64);
                    builder.append_data(&mut header, path, bytes.as_slice())
                }
                Entry::Directory => {
                    header.set_entry_type(tar::EntryType::Directory);
                    builder.append_data(&mut header, path, &[][..])
                }
                Entry::Symlink(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    builder.append_link(&mut header, path, target)
                }
            };
            added.expect("a path for an archive");
        }
        self.layers.push(builder.into_inner().expect("memory"));
        self
    }

    /// With this tar archive as one more layer.
    #[must_use]
    pub fn archive(mut self, tar: Vec<u8>) -> Self {
        self.layers.push(tar);
        self
    }

    /// One with a shell and little else: busybox, linked statically, and no C library at all.
    ///
    /// # Panics
    ///
    /// If busybox is not on this host.
    #[must_use]
    pub fn busybox(config: Value) -> Self {
        let binary = fs::read("/bin/busybox").expect("busybox-static is installed");
        let mut entries = vec![
            ("bin", Entry::Directory),
            ("bin/busybox", Entry::File(binary, 0o755)),
        ];
        for name in [
            "bin/sh", "bin/cat", "bin/echo", "bin/id", "bin/ls", "bin/env", "bin/pwd",
        ] {
            entries.push((name, Entry::Symlink("busybox".to_owned())));
        }
        Self::new(config).layer(&entries)
    }

    /// One with a single program, `/program`, and nothing else: no shell, no `/etc`, no `/tmp`.
    ///
    /// # Panics
    ///
    /// If busybox is not on this host.
    #[must_use]
    pub fn single(config: Value) -> Self {
        let binary = fs::read("/bin/busybox").expect("busybox-static is installed");
        Self::new(config).layer(&[("busybox", Entry::File(binary, 0o755))])
    }

    fn config_file(&self) -> Vec<u8> {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| digest(layer)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        config.to_string().into_bytes()
    }

    /// What `docker save` would write.
    ///
    /// # Panics
    ///
    /// Never: memory does.
    #[must_use]
    pub fn docker_archive(&self, tags: &[&str]) -> Vec<u8> {
        let config = self.config_file();
        let name = format!("{}.json", hex(&config));
        let paths: Vec<_> = (0..self.layers.len())
            .map(|n| format!("{n}/layer.tar"))
            .collect();
        let manifest = json!([{ "Config": name, "RepoTags": tags, "Layers": paths }]).to_string();
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(bytes.len() as u64);
            builder
                .append_data(&mut header, name, bytes)
                .expect("memory");
        };
        add(&name, &config);
        for (path, layer) in paths.iter().zip(&self.layers) {
            add(path, layer);
        }
        add("manifest.json", manifest.as_bytes());
        builder.into_inner().expect("memory")
    }

    /// The blobs it consists of, and its manifest last.
    fn blobs(&self) -> Vec<Vec<u8>> {
        let config = self.config_file();
        let mut blobs: Vec<_> = self.layers.iter().map(|layer| gzip(layer)).collect();
        let layers: Vec<_> = blobs
            .iter()
            .map(|blob| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers,
        });
        blobs.push(config);
        blobs.push(manifest.to_string().into_bytes());
        blobs
    }

    /// Writes it as an OCI image layout into `dir`.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn write_layout(&self, dir: &Path, name: &str) -> Result<()> {
        let blobs = self.blobs();
        fs::create_dir_all(dir.join("blobs/sha256"))?;
        for blob in &blobs {
            fs::write(dir.join("blobs/sha256").join(hex(blob)), blob)?;
        }
        let manifest = blobs.last().context("a manifest")?;
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", manifest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        fs::write(dir.join("index.json"), index.to_string())?;
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// `sha256:` and the digits of these bytes.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(bytes))
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut writer, bytes).expect("memory");
    writer.finish().expect("memory")
}

/// A compressed tar archive of programs.
///
/// # Panics
///
/// If a name is none.
#[must_use]
pub fn targz(programs: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in programs {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        builder
            .append_data(&mut header, name, *bytes)
            .expect("memory");
    }
    gzip(&builder.into_inner().expect("memory"))
}

/// Makes an authority, and a certificate of 127.0.0.1 that it vouches for.
fn certify(dir: &Path) -> Result<()> {
    let openssl = |words: &str| -> Result<()> {
        let status = Command::new("openssl")
            .args(words.split(' '))
            .current_dir(dir)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("running openssl")?;
        anyhow::ensure!(status.success(), "openssl {words}: {status}");
        Ok(())
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(&format!(
        "req -x509 {key} -keyout authority.key -out authority.pem -days 2 -subj /CN=authority"
    ))?;
    openssl(&format!(
        "req {key} -keyout server.key -out server.csr -subj /CN=registry"
    ))?;
    fs::write(dir.join("extensions"), "subjectAltName=IP:127.0.0.1\n")?;
    openssl(
        "x509 -req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial -out server.pem \
         -days 2 -extfile extensions",
    )
}

/// Debian's `docker-registry` on a port of its own. Ends with the value.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Registry {
    /// Starts one.
    ///
    /// # Panics
    ///
    /// If it does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::try_start(false).unwrap_or_else(|error| panic!("no registry: {error:#}"))
    }

    /// Starts one that speaks with encryption only, by a certificate of an authority of its own:
    /// [`Registry::authority`].
    ///
    /// # Panics
    ///
    /// If it does not start.
    #[must_use]
    pub fn start_encrypted() -> Self {
        Self::try_start(true).unwrap_or_else(|error| panic!("no registry: {error:#}"))
    }

    /// The certificate of the authority that vouches for it.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.dir.path().join("authority.pem")
    }

    fn try_start(encrypted: bool) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let tls = if encrypted {
            certify(dir.path())?;
            let own = dir.path().display();
            format!(", tls: {{certificate: {own}/server.pem, key: {own}/server.key}}")
        } else {
            String::new()
        };
        let config = dir.path().join("config.yml");
        let root = dir.path().join("content");
        let text = format!(
            "version: 0.1\nlog: {{level: info, formatter: json}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'{tls}}}\n",
            root.display()
        );
        fs::write(&config, text)?;
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("running docker-registry")?;
        let stderr = child.stderr.take().context("a pipe")?;
        let mut lines = BufReader::new(stderr).lines();
        let mut port = None;
        // It says where it listens, and then what is asked of it.
        for line in lines.by_ref() {
            let line = line?;
            if let Some((_, rest)) = line.split_once("listening on 127.0.0.1:") {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                port = Some(digits.parse()?);
                break;
            }
        }
        let log = File::create(dir.path().join("log"))?;
        std::thread::spawn(move || {
            use std::io::Write as _;
            let mut log = log;
            for line in lines.map_while(std::result::Result::ok) {
                let _ = writeln!(log, "{line}");
            }
        });
        let port = port.context("it ended before it listened")?;
        Ok(Self { child, dir, port })
    }

    /// Its name, `127.0.0.1:PORT`.
    #[must_use]
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Puts an image in, and says how to call it. Its own storage is written to: pushing is not what is
    /// tested.
    ///
    /// # Panics
    ///
    /// If that fails.
    #[must_use]
    pub fn put(&self, image: &TestImage, repository: &str, tag: &str) -> String {
        self.try_put(image, repository, tag)
            .unwrap_or_else(|error| panic!("{repository}:{tag} is not in the registry: {error:#}"));
        format!("{}/{repository}:{tag}", self.host())
    }

    fn try_put(&self, image: &TestImage, repository: &str, tag: &str) -> Result<()> {
        let blobs = image.blobs();
        let root = self.dir.path().join("content/docker/registry/v2");
        let own = root.join("repositories").join(repository);
        let write = |path: PathBuf, bytes: &[u8]| -> Result<()> {
            fs::create_dir_all(path.parent().context("a parent")?)?;
            Ok(fs::write(path, bytes)?)
        };
        for blob in &blobs {
            let (hex, digest) = (hex(blob), digest(blob));
            write(
                root.join(format!("blobs/sha256/{}/{hex}/data", &hex[..2])),
                blob,
            )?;
            write(
                own.join(format!("_layers/sha256/{hex}/link")),
                digest.as_bytes(),
            )?;
        }
        let manifest = blobs.last().context("a manifest")?;
        let (hex, digest) = (hex(manifest), digest(manifest));
        write(
            own.join(format!("_manifests/revisions/sha256/{hex}/link")),
            digest.as_bytes(),
        )?;
        let tag = own.join(format!("_manifests/tags/{tag}"));
        write(tag.join("current/link"), digest.as_bytes())?;
        write(
            tag.join(format!("index/sha256/{hex}/link")),
            digest.as_bytes(),
        )
    }

    /// How many requests for blobs it has answered with one.
    ///
    /// # Panics
    ///
    /// If its log cannot be read.
    #[must_use]
    pub fn blobs_served(&self) -> usize {
        let log = fs::read_to_string(self.dir.path().join("log")).expect("the log");
        log.lines()
            .filter(|line| line.contains("response completed") && line.contains("/blobs/"))
            .count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
