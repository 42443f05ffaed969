//! Against a registry that does what a test tells it to.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::test_server::{Answer, Asked, Server, answer};

/// What a registry has, by path.
#[derive(Clone, Default)]
struct Content(HashMap<String, Vec<u8>>);

impl Content {
    /// One image, `own:1`, with these layers.
    fn image(layers: &[Vec<u8>]) -> (Self, Digest) {
        let mut content = Self::default();
        let config = json!({
            "architecture": Platform::of_guests().architecture, "os": "linux",
            "config": { "Cmd": ["hello"] },
            "rootfs": { "diff_ids": layers.iter().map(|layer| Digest::of(layer)).collect::<Vec<_>>() },
        });
        let config = content.blob(config.to_string().into_bytes());
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| content.blob(layer.clone()))
            .collect();
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let digest = content.manifest(manifest.to_string().into_bytes(), "1");
        (content, digest)
    }

    fn blob(&mut self, bytes: Vec<u8>) -> Value {
        let digest = Digest::of(&bytes);
        let descriptor = json!({ "digest": digest, "size": bytes.len() });
        self.0.insert(format!("/v2/own/blobs/{digest}"), bytes);
        descriptor
    }

    fn manifest(&mut self, bytes: Vec<u8>, tag: &str) -> Digest {
        let digest = Digest::of(&bytes);
        self.0
            .insert(format!("/v2/own/manifests/{digest}"), bytes.clone());
        self.0.insert(format!("/v2/own/manifests/{tag}"), bytes);
        digest
    }

    fn answer(&self, asked: &Asked) -> Answer {
        if asked.path == "/v2/" {
            return answer(200, "{}");
        }
        match self.0.get(&asked.path) {
            None => answer(
                404,
                r#"{"errors":[{"code":"X","message":"manifest \u001b[1munknown"}]}"#,
            ),
            Some(bytes) => match asked.first_byte() {
                0 => answer(200, bytes.clone()),
                from => answer(206, bytes[from..].to_vec()).with(
                    "content-range",
                    format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()),
                ),
            },
        }
    }
}

struct Client {
    dir: tempfile::TempDir,
    settings: RegistrySettings,
    cancel: Cancel,
}

impl Client {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            settings: RegistrySettings::default(),
            cancel: Cancel::new().unwrap(),
        }
    }

    fn find(&self, name: &str) -> Result<Remote, HostError> {
        let programs = Programs::new(crate::packages::SYSTEM_DIRS.map(Into::into));
        let reference = name.parse().unwrap();
        Remote::find(
            &reference,
            &Platform::of_guests(),
            &self.settings,
            &programs,
            &self.cancel,
        )
    }

    fn fetch(&self, remote: &Remote) -> Result<Vec<u8>, HostError> {
        let layer = remote.layers()[0];
        let mut bytes = Vec::new();
        let mut last = 0;
        let mut file = remote.fetch(&Os::new(), &layer, self.dir.path(), &mut |at| last = at)?;
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(last, layer.size);
        Ok(bytes)
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| {
                entry
                    .unwrap()
                    .path()
                    .extension()
                    .map_or("whole".into(), |e| e.to_string_lossy().into_owned())
            })
            .collect();
        names.sort();
        names
    }
}

fn cause(error: HostError) -> String {
    error
        .into_source()
        .map(|source| source.to_string())
        .unwrap_or_default()
}

fn large() -> Vec<u8> {
    (0..1_000_000_u32).map(|n| n.to_le_bytes()[1]).collect()
}

#[test]
fn an_image_is_found_by_tag_and_by_digest() {
    let (content, digest) = Content::image(&[large()]);
    let served = content.clone();
    let server = Server::new(move |asked, _| served.answer(asked));
    let client = Client::new();
    for name in [
        format!("{}/own:1", server.host()),
        format!("{}/own@{digest}", server.host()),
        format!("{}/own:other@{digest}", server.host()),
    ] {
        let remote = client.find(&name).unwrap();
        assert_eq!(remote.digest, digest);
        assert_eq!(remote.config.cmd, ["hello"]);
        assert!(client.fetch(&remote).unwrap() == large());
    }
    let accept = &server.asked("/manifests/1")[0].headers["accept"];
    assert!(accept.contains("image.index.v1+json") && accept.contains("manifest.v2+json"));
    // Brought once; found there after that.
    assert_eq!(
        server
            .asked("/blobs/")
            .iter()
            .filter(|one| one.path.contains(&Digest::of(&large()).hex()))
            .count(),
        1
    );
    let error = client
        .find(&format!("{}/own:none", server.host()))
        .unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::NotFound);
    assert_eq!(
        cause(error),
        "the registry answers 404 Not Found: manifest \\u{1b}[1munknown"
    );
}

#[test]
fn of_an_index_the_manifest_for_guests_is_taken() {
    let (mut content, own) = Content::image(&[large()]);
    let platform = |architecture: &str| json!({ "os": "linux", "architecture": architecture });
    let index = json!({ "schemaVersion": 2, "manifests": [
        { "digest": Digest::of(b"other"), "size": 1, "platform": platform("s390x") },
        { "digest": own, "size": 1, "platform": platform(&Platform::of_guests().architecture) },
    ]});
    let index = content.manifest(index.to_string().into_bytes(), "all");
    let served = content.clone();
    let server = Server::new(move |asked, _| served.answer(asked));
    let client = Client::new();
    let remote = client.find(&format!("{}/own:all", server.host())).unwrap();
    assert_eq!(
        remote.digest, index,
        "it is called by what its name leads to"
    );
    assert!(client.fetch(&remote).unwrap() == large());
}

#[test]
fn a_download_goes_on_where_it_ended() {
    for honours_ranges in [true, false] {
        let (content, _) = Content::image(&[large()]);
        let layer = Digest::of(&large()).to_string();
        let server = Server::new(move |asked, before| {
            if asked.path.contains(&layer) && before < 3 {
                let whole = content.answer(asked);
                return whole.cut(200_000);
            }
            let mut asked = asked.clone();
            if !honours_ranges {
                asked.headers.remove("range");
            }
            content.answer(&asked)
        });
        let client = Client::new();
        let remote = client.find(&format!("{}/own:1", server.host())).unwrap();
        assert!(client.fetch(&remote).unwrap() == large());
        let ranges: Vec<_> = server
            .asked(&Digest::of(&large()).hex())
            .iter()
            .map(Asked::first_byte)
            .collect();
        assert_eq!(ranges[0], 0);
        assert!(
            ranges.windows(2).all(|pair| pair[0] < pair[1]),
            "{ranges:?}"
        );
        assert_eq!(client.files(), ["whole"]);
    }
}

#[test]
fn what_another_process_left_is_used_if_it_is_good() {
    let (content, _) = Content::image(&[large()]);
    let server = Server::new(move |asked, _| content.answer(asked));
    for (left, asked_from) in [
        (large()[..300_000].to_vec(), vec![300_000]),
        (large(), vec![]),
        // A power failure, or something longer than there is.
        (vec![0; 300_000], vec![300_000, 0]),
        (vec![0; 1_000_000], vec![0]),
        (vec![0; 1_000_001], vec![0]),
    ] {
        server.log.lock().unwrap().clear();
        let client = Client::new();
        let remote = client.find(&format!("{}/own:1", server.host())).unwrap();
        let partial = format!("sha256-{}.partial", Digest::of(&large()).hex());
        fs::write(client.dir.path().join(partial), left).unwrap();
        assert!(client.fetch(&remote).unwrap() == large());
        let asked = server.asked(&Digest::of(&large()).hex());
        let asked: Vec<_> = asked.iter().map(Asked::first_byte).collect();
        assert_eq!(asked, asked_from);
    }
}

#[test]
fn what_is_not_what_its_digest_says_is_refused_and_does_not_stay() {
    let (content, digest) = Content::image(&[large()]);
    let layer = Digest::of(&large()).to_string();
    let mut other = large();
    other[500_000] ^= 1;
    let longer = [large(), vec![0]].concat();
    for body in [other, longer] {
        let (content, layer) = (content.clone(), layer.clone());
        let server = Server::new(move |asked, _| {
            if asked.path.contains(&layer) {
                return answer(200, body.clone());
            }
            content.answer(asked)
        });
        let client = Client::new();
        let remote = client.find(&format!("{}/own:1", server.host())).unwrap();
        let error = client.fetch(&remote).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Corrupt, "{error:?}");
        assert_eq!(client.files(), Vec::<String>::new());
    }
    // Manifest and configuration.
    for part in ["/manifests/", "/blobs/"] {
        let content = content.clone();
        let server = Server::new(move |asked, _| {
            let mut answer = content.answer(asked);
            if asked.path.contains(part) {
                answer.body.push(b' ');
            }
            answer
        });
        let error = Client::new()
            .find(&format!("{}/own@{digest}", server.host()))
            .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Corrupt, "{part}: {error:?}");
    }
    // One that never ends.
    let server = Server::new(|asked, _| match asked.path.as_str() {
        "/v2/" => answer(200, ""),
        _ => answer(200, vec![b' '; 5 << 20]),
    });
    let error = Client::new()
        .find(&format!("{}/own:1", server.host()))
        .unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Corrupt, "{error:?}");
}

/// Wants a token, which it gives to `ada` with `secret`, or with a token of identity.
fn guarded(content: Content, open_to_all: bool) -> Server {
    Server::new(move |asked, _| {
        let authorization = asked
            .headers
            .get("authorization")
            .cloned()
            .unwrap_or_default();
        let host = &asked.headers["host"];
        if asked.path.starts_with("/token") {
            let known = open_to_all
                || authorization == "Basic YWRhOnNlY3JldA=="
                || asked.body.contains("refresh_token=identity");
            return match known {
                true => answer(200, r#"{"token":"good"}"#),
                false => answer(401, r#"{"details":"incorrect username or password"}"#),
            };
        }
        if authorization == "Bearer good" {
            return content.answer(asked);
        }
        answer(401, "").with(
            "www-authenticate",
            format!(
                "Bearer realm=\"http://{host}/token\",service=\"x\",scope=\"repository:own:pull\""
            ),
        )
    })
}

#[test]
fn tokens_are_fetched_with_the_credentials_of_this_host() {
    let (content, _) = Content::image(&[large()]);
    let client = |auth: &str, server: &Server| {
        let mut client = Client::new();
        let file = client.dir.path().join("auth.json");
        fs::write(
            &file,
            format!(r#"{{"auths":{{"{}":{auth}}}}}"#, server.host()),
        )
        .unwrap();
        client.settings.auth_files = vec![file];
        client
    };
    let server = guarded(content.clone(), false);
    let name = format!("{}/own:1", server.host());
    for auth in [
        r#"{"auth":"YWRhOnNlY3JldA=="}"#,
        r#"{"identitytoken":"identity"}"#,
    ] {
        client(auth, &server).find(&name).unwrap();
    }
    let tokens = server.asked("/token");
    assert_eq!(
        tokens[0].path,
        "/token?scope=repository%3Aown%3Apull&service=x"
    );
    assert_eq!(
        (tokens[1].method.as_str(), tokens.len()),
        ("POST", 2),
        "one token does for all"
    );

    for auth in [r#"{"auth":"YWRhOndyb25n"}"#, "{}"] {
        let error = client(auth, &server).find(&name).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::PermissionDenied);
        assert!(
            error.hint().unwrap().contains("docker login 127.0.0.1"),
            "{error:?}"
        );
        assert!(cause(error).contains("incorrect username or password"));
    }
    // Without credentials a token may be given as well.
    Client::new()
        .find(&format!("{}/own:1", guarded(content, true).host()))
        .unwrap();
}

#[test]
fn a_redirect_to_another_host_does_not_get_the_token() {
    let (content, _) = Content::image(&[large()]);
    let elsewhere = {
        let content = content.clone();
        Arc::new(Server::new(move |asked, _| content.answer(asked)))
    };
    let (target, layer) = (elsewhere.host(), Digest::of(&large()).to_string());
    let server = Server::new(move |asked, _| {
        if !asked.headers.contains_key("authorization") && !asked.path.starts_with("/token") {
            let realm = format!("Bearer realm=\"http://{}/token\"", asked.headers["host"]);
            return answer(401, "").with("www-authenticate", realm);
        }
        if asked.path.starts_with("/token") {
            return answer(200, r#"{"access_token":"good"}"#);
        }
        if asked.path.contains(&layer) {
            return answer(307, "").with("location", format!("http://{target}{}", asked.path));
        }
        content.answer(asked)
    });
    let client = Client::new();
    let remote = client.find(&format!("{}/own:1", server.host())).unwrap();
    assert!(client.fetch(&remote).unwrap() == large());
    let asked = elsewhere.asked("/blobs/");
    assert_eq!(asked.len(), 1);
    assert!(!asked[0].headers.contains_key("authorization"));
}

#[test]
fn what_may_pass_is_tried_again_and_what_will_not_is_not() {
    let (content, _) = Content::image(&[large()]);
    let server = {
        let content = content.clone();
        Server::new(move |asked, before| {
            if asked.path.contains("/manifests/") && before < 2 {
                return answer(503, "");
            }
            content.answer(asked)
        })
    };
    Client::new()
        .find(&format!("{}/own:1", server.host()))
        .unwrap();
    assert_eq!(server.asked("/manifests/").len(), 3);

    let server = Server::new(|_, _| answer(429, r#"{"errors":[{"code":"TOOMANYREQUESTS"}]}"#));
    // Not one that is known to speak without encryption by its first answer.
    let mut client = Client::new();
    client
        .settings
        .mirrors
        .insert("x.example".to_owned(), vec![]);
    let error = client.find_direct(&server).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Network);
    assert!(error.hint().unwrap().contains("docker login"));
    assert_eq!(server.asked("/manifests/").len(), 1);
}

impl Client {
    /// Asks by the mirror's URL, which says that it speaks without encryption.
    fn find_direct(&self, server: &Server) -> Result<Remote, HostError> {
        let reference = "x.example/own:1".parse().unwrap();
        let programs = Programs::new(crate::packages::SYSTEM_DIRS.map(Into::into));
        let http = Http::new(&programs, &ProxySettings::default(), &[], &self.cancel)?;
        let place = format!("http://{}", server.host());
        let endpoint = Endpoint::new(&place, &reference, &self.settings, &programs, &http)?;
        Remote::find_at(endpoint, &reference, &Platform::of_guests(), http)
    }
}

#[test]
fn mirrors_are_asked_first_and_may_lack_it() {
    let (content, _) = Content::image(&[large()]);
    let served = content.clone();
    let server = Server::new(move |asked, _| served.answer(asked));
    let empty = Server::new(|_, _| answer(404, ""));
    let mut client = Client::new();
    client.settings.mirrors.insert(
        "registry.invalid".to_owned(),
        vec![
            format!("http://{}", empty.host()),
            format!("http://{}/", server.host()),
        ],
    );
    client.find("registry.invalid/own:1").unwrap();
    assert_eq!(empty.asked("/manifests/").len(), 1);

    client.settings.mirrors.clear();
    client.settings.mirrors.insert(
        "registry.invalid".to_owned(),
        vec!["http://192.0.2.1".to_owned()],
    );
    let http = Http::new(
        &Programs::new([]),
        &ProxySettings::default(),
        &[],
        &client.cancel,
    )
    .unwrap();
    let reference: Reference = "registry.invalid/own:1".parse().unwrap();
    let open = Endpoint::new(
        "http://192.0.2.1",
        &reference,
        &client.settings,
        &Programs::new([]),
        &http,
    );
    let error = open.unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::PermissionDenied);
    assert!(error.hint().unwrap().contains("--plain-http 192.0.2.1"));
    client.settings.plain_http.push("192.0.2.1".to_owned());
    let open = Endpoint::new(
        "http://192.0.2.1",
        &reference,
        &client.settings,
        &Programs::new([]),
        &http,
    );
    assert_eq!(open.unwrap().base, "http://192.0.2.1");
}

#[test]
fn cancelling_ends_a_download_that_hangs() {
    let (content, _) = Content::image(&[large()]);
    let layer = Digest::of(&large()).to_string();
    let client = Client::new();
    let cancel = client.cancel.clone();
    let server = Server::new(move |asked, _| {
        let mut answer = content.answer(asked);
        if asked.path.contains(&layer) {
            answer = answer.cut(100_000);
            answer.hang = true;
        }
        answer
    });
    let remote = client.find(&format!("{}/own:1", server.host())).unwrap();
    let layer = remote.layers()[0];
    let result = remote.fetch(&Os::new(), &layer, client.dir.path(), &mut |_| {
        cancel.cancel()
    });
    assert_eq!(result.unwrap_err().kind(), HostErrorKind::Interrupted);
    // What came stays for the next attempt.
    assert_eq!(client.files(), ["partial"]);
}

#[test]
fn of_several_that_want_a_layer_one_brings_it() {
    let (content, _) = Content::image(&[large()]);
    let server = Server::new(move |asked, _| content.answer(asked));
    let client = Client::new();
    let name = format!("{}/own:1", server.host());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let remote = client.find(&name).unwrap();
                assert!(client.fetch(&remote).unwrap() == large());
            });
        }
    });
    assert_eq!(server.asked(&Digest::of(&large()).hex()).len(), 1);
    assert_eq!(client.files(), ["whole"]);
}
