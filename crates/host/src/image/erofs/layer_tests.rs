//! Layers over one another, compared with what tar(1) makes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Cursor;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use tar::EntryType as T;

use super::tests::{Content, Image, raw};
use super::*;

type Raw<'a> = (&'a str, T, &'a str, &'a [u8]);

fn apply(layers: &[Vec<u8>], limits: Limits) -> io::Result<Vec<u8>> {
    let mut image = Cursor::new(Vec::new());
    let mut builder = Builder::new(&mut image, Special::default(), limits)?;
    for layer in layers {
        builder.layer(layer.as_slice())?;
    }
    builder.finish()?;
    Ok(image.into_inner())
}

fn layers(layers: &[&[Raw<'_>]]) -> Vec<Vec<u8>> {
    layers.iter().map(|layer| raw(layer)).collect()
}

/// Paths of the image made of these layers, with the content of files and the target of links.
fn tree(of: &[&[Raw<'_>]]) -> BTreeMap<String, String> {
    let image = apply(&layers(of), Limits::NONE).unwrap();
    let found = Image(&image).read();
    let said = found.into_iter().map(|(path, (_, thing))| {
        let content = match thing.content {
            Content::File(bytes) => String::from_utf8(bytes).unwrap(),
            Content::Symlink(target) => format!("-> {target}"),
            Content::Directory => "/".to_owned(),
            other => format!("{other:?}"),
        };
        (path, content)
    });
    said.filter(|(path, _)| !path.is_empty()).collect()
}

fn expect(found: &BTreeMap<String, String>, expected: &[(&str, &str)]) {
    let found: Vec<_> = found
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn a_whiteout_hides_what_is_below_and_nothing_of_its_own_layer() {
    let base: &[Raw<'_>] = &[
        ("a", T::Directory, "", b""),
        ("a/one", T::Regular, "", b"1"),
        ("a/two", T::Regular, "", b"2"),
        ("b/deep/file", T::Regular, "", b"3"),
        ("c", T::Regular, "", b"4"),
    ];
    let top: &[Raw<'_>] = &[
        ("a/.wh.one", T::Regular, "", b""),
        ("b/.wh.deep", T::Regular, "", b"ignored"),
        // Before and behind what the same layer has under that name.
        (".wh.c", T::Regular, "", b""),
        ("c", T::Regular, "", b"new"),
        ("a/new", T::Regular, "", b"5"),
        ("a/.wh.new", T::Regular, "", b""),
        ("nowhere/.wh.x", T::Regular, "", b""),
        (".wh..wh.plnk/1.2", T::Regular, "", b""),
        (".wh..wh.aufs", T::Regular, "", b""),
    ];
    expect(
        &tree(&[base, top]),
        &[
            ("/a", "/"),
            ("/a/new", "5"),
            ("/a/two", "2"),
            ("/b", "/"),
            ("/c", "new"),
        ],
    );
}

#[test]
fn an_opaque_directory_has_only_what_its_layer_and_those_above_put_in() {
    let base: &[Raw<'_>] = &[
        ("a/one", T::Regular, "", b"1"),
        ("a/sub/two", T::Regular, "", b"2"),
        ("a/sub/deep/three", T::Regular, "", b"3"),
    ];
    let middle: &[Raw<'_>] = &[
        ("a/sub/new", T::Regular, "", b"4"),
        ("a/.wh..wh..opq", T::Regular, "", b""),
    ];
    let top: &[Raw<'_>] = &[("a/last", T::Regular, "", b"5")];
    expect(
        &tree(&[base, middle, top]),
        &[
            ("/a", "/"),
            ("/a/last", "5"),
            ("/a/sub", "/"),
            ("/a/sub/new", "4"),
        ],
    );
    // A directory that replaces a removed one is new, even if its parents are not said again.
    let again: &[Raw<'_>] = &[
        ("a/sub/kept", T::Regular, "", b"6"),
        ("a/.wh.sub", T::Regular, "", b""),
    ];
    expect(
        &tree(&[base, again]),
        &[
            ("/a", "/"),
            ("/a/one", "1"),
            ("/a/sub", "/"),
            ("/a/sub/kept", "6"),
        ],
    );
}

#[test]
fn links_of_lower_layers_lead_within_the_image() {
    let base: &[Raw<'_>] = &[
        ("usr/lib/x", T::Regular, "", b"1"),
        ("lib", T::Symlink, "usr/lib", b""),
        ("up", T::Symlink, "../../../../../usr", b""),
        ("abs", T::Symlink, "/usr/lib", b""),
        ("loop", T::Symlink, "loop", b""),
        ("dangling", T::Symlink, "made/here", b""),
    ];
    let top: &[Raw<'_>] = &[
        ("lib/y", T::Regular, "", b"2"),
        ("up/z", T::Regular, "", b"3"),
        ("abs/.wh.x", T::Regular, "", b""),
        ("dangling/file", T::Regular, "", b"4"),
        ("hard", T::Link, "lib/y", b""),
        // The link itself, not what it leads to.
        ("dangling2", T::Link, "dangling", b""),
    ];
    expect(
        &tree(&[base, top]),
        &[
            ("/abs", "-> /usr/lib"),
            ("/dangling", "-> made/here"),
            ("/dangling2", "-> made/here"),
            ("/hard", "2"),
            ("/lib", "-> usr/lib"),
            ("/loop", "-> loop"),
            ("/made", "/"),
            ("/made/here", "/"),
            ("/made/here/file", "4"),
            ("/up", "-> ../../../../../usr"),
            ("/usr", "/"),
            ("/usr/lib", "/"),
            ("/usr/lib/y", "2"),
            ("/usr/z", "3"),
        ],
    );
    for bad in ["loop/x", "usr/lib/x/below"] {
        let top: &[Raw<'_>] = &[(bad, T::Regular, "", b"")];
        let error = apply(&layers(&[base, top]), Limits::NONE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bad}");
    }
}

#[test]
fn names_are_counted_when_a_layer_takes_them_away() {
    let base: &[Raw<'_>] = &[
        ("kept", T::Regular, "", b"1"),
        ("dir/same", T::Link, "kept", b""),
        ("dir/sub/same", T::Link, "kept", b""),
        ("other", T::Link, "kept", b""),
    ];
    let links = |top: &[Raw<'_>]| {
        let image = apply(&layers(&[base, top]), Limits::NONE).unwrap();
        // The reader compares each count with the names it finds.
        let found = Image(&image).read();
        let kept = found["/kept"].0;
        found.values().filter(|(inode, _)| *inode == kept).count()
    };
    assert_eq!(links(&[]), 4);
    assert_eq!(links(&[(".wh.dir", T::Regular, "", b"")]), 2);
    assert_eq!(links(&[("dir", T::Regular, "", b"")]), 2);
    assert_eq!(links(&[("dir/sub/.wh..wh..opq", T::Regular, "", b"")]), 3);
    assert_eq!(links(&[("other", T::Regular, "", b"")]), 3);
}

#[test]
fn hostile_layers_are_refused() {
    let base: &[Raw<'_>] = &[("etc/passwd", T::Regular, "", b"1")];
    for top in [
        [("../x", T::Regular, "", &b""[..])],
        [("a/../../x", T::Regular, "", b"")],
        [("../.wh.x", T::Regular, "", b"")],
        [("hard", T::Link, "../../etc/shadow", b"")],
        [("hard", T::Link, "/etc/shadow", b"")],
        [("etc/.wh.", T::Regular, "", b"")],
        [("etc/.wh..", T::Regular, "", b"")],
        [("etc/.wh...", T::Regular, "", b"")],
    ] {
        let error = apply(&layers(&[base, &top]), Limits::NONE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{top:?}");
    }
    // Names are relative to the image's root, whatever they look like.
    let top: &[Raw<'_>] = &[
        ("/etc/shadow", T::Regular, "", b"2"),
        ("hard", T::Link, "/etc/passwd", b""),
    ];
    let found = tree(&[base, top]);
    assert_eq!(found["/etc/shadow"], "2");
    assert_eq!(found["/hard"], "1");
}

#[test]
fn what_is_more_than_the_limits_is_refused() {
    let files: &[Raw<'_>] = &[
        ("a", T::Regular, "", &[1; 600]),
        ("b", T::Regular, "", &[2; 600]),
    ];
    let try_with = |bytes, entries| apply(&layers(&[files]), Limits { bytes, entries });
    assert!(try_with(1200, 2).is_ok());
    for (bytes, entries) in [(1199, 2), (1200, 1)] {
        let error = try_with(bytes, entries).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("the limit"), "{error}");
    }
}

#[test]
fn a_directory_is_made_only_where_nothing_is() {
    let base: &[Raw<'_>] = &[
        ("srv", T::Directory, "", b""),
        ("home", T::Symlink, "srv", b""),
        ("file", T::Regular, "", b"1"),
    ];
    let mut image = Cursor::new(Vec::new());
    let mut builder = Builder::new(&mut image, Special::default(), Limits::NONE).unwrap();
    builder.layer(raw(base).as_slice()).unwrap();
    for path in ["/srv", "/home/app", "/work/x", "/"] {
        builder.directory(path).unwrap();
    }
    assert!(builder.directory("/file/x").is_err());
    builder.finish().unwrap();
    let image = image.into_inner();
    let found = Image(&image).read();
    let paths: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(
        paths,
        ["", "/file", "/home", "/srv", "/srv/app", "/work", "/work/x"]
    );
    assert_eq!(found["/srv"].1.mode, 0o750, "it stays as it was");
}

#[test]
fn a_layer_may_end_without_its_mark_but_not_within_an_entry() {
    let whole = raw(&[("a", T::Regular, "", &[7; 600])]);
    for (length, good) in [
        (0, true),
        (1536, true),
        (2048, true),
        (1535, false),
        (600, false),
        (100, false),
    ] {
        let result = apply(&[whole[..length].to_vec()], Limits::NONE);
        assert_eq!(result.is_ok(), good, "{length}");
    }
}

/// What a layer has under a path.
#[derive(Debug, Clone)]
enum Op {
    Directory,
    File(u8),
    Symlink,
    /// Another name of the first file of the layer.
    HardLink,
    Whiteout,
    Opaque,
}

fn path() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
}

fn layer() -> impl Strategy<Value = (Vec<(String, Op)>, bool)> {
    let op = prop_oneof![
        2 => Just(Op::Directory),
        4 => any::<u8>().prop_map(Op::File),
        1 => Just(Op::Symlink),
        1 => Just(Op::HardLink),
        2 => Just(Op::Whiteout),
        1 => Just(Op::Opaque),
    ];
    let ops = prop::collection::vec((path(), op), 0..12);
    (ops, any::<bool>()).prop_map(|(ops, whiteouts_first)| {
        let mut things: BTreeMap<String, Op> = BTreeMap::new();
        let mut marks = BTreeSet::new();
        for (path, op) in ops {
            let joined = path.join("/");
            let parents: Vec<_> = (1..path.len()).map(|n| path[..n].join("/")).collect();
            let is_dir = |op: Option<&Op>| matches!(op, None | Some(Op::Directory));
            if !parents.iter().all(|parent| is_dir(things.get(parent))) {
                continue;
            }
            // Every parent is said, so that tar(1) does as we do.
            for parent in parents {
                things.insert(parent, Op::Directory);
            }
            match op {
                Op::Whiteout => drop(marks.insert((joined, false))),
                Op::Opaque if is_dir(things.get(&joined)) => {
                    things.insert(joined.clone(), Op::Directory);
                    marks.insert((joined, true));
                }
                Op::Opaque => {}
                // Not a file in the place of a directory of this layer that has something.
                op => {
                    let below = format!("{joined}/");
                    let is_free = !marks.contains(&(joined.clone(), true))
                        && !things.keys().any(|known| known.starts_with(&below));
                    if is_free || matches!(op, Op::Directory) {
                        things.insert(joined, op);
                    }
                }
            }
        }
        let marks: Vec<_> = marks
            .into_iter()
            .map(|(path, opaque)| (path, if opaque { Op::Opaque } else { Op::Whiteout }))
            .collect();
        let things: Vec<_> = things.into_iter().collect();
        let all = if whiteouts_first {
            [marks, things].concat()
        } else {
            [things, marks].concat()
        };
        (all, whiteouts_first)
    })
}

fn whiteout_path(path: &str, op: &Op) -> String {
    match (op, path.rsplit_once('/')) {
        (Op::Opaque, _) => format!("{path}/.wh..wh..opq"),
        (_, Some((dir, name))) => format!("{dir}/.wh.{name}"),
        (_, None) => format!(".wh.{path}"),
    }
}

fn tar_of(ops: &[(String, Op)]) -> Vec<u8> {
    let first = ops.iter().position(|(_, op)| matches!(op, Op::File(_)));
    let mut contents = Vec::new();
    for (at, (path, op)) in ops.iter().enumerate() {
        contents.push(match op {
            Op::File(byte) => (path.clone(), T::Regular, String::new(), vec![*byte; 9]),
            Op::Symlink => (path.clone(), T::Symlink, "nowhere".to_owned(), Vec::new()),
            Op::HardLink => match first.filter(|first| *first < at) {
                Some(first) => (path.clone(), T::Link, ops[first].0.clone(), Vec::new()),
                None => (path.clone(), T::Regular, String::new(), b"alone".to_vec()),
            },
            Op::Directory => (path.clone(), T::Directory, String::new(), Vec::new()),
            Op::Whiteout | Op::Opaque => (
                whiteout_path(path, op),
                T::Regular,
                String::new(),
                Vec::new(),
            ),
        });
    }
    let entries: Vec<Raw<'_>> = contents
        .iter()
        .map(|(path, kind, link, data)| (path.as_str(), *kind, link.as_str(), data.as_slice()))
        .collect();
    raw(&entries)
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(status) if status.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// Unpacks a layer over a directory with tar(1), after what it hides is gone.
fn unpack(root: &Path, ops: &[(String, Op)], tar: &[u8]) {
    for (path, op) in ops {
        let place = root.join(path);
        match op {
            Op::Whiteout => remove(&place),
            Op::Opaque if fs::symlink_metadata(&place).is_ok_and(|status| status.is_dir()) => {
                remove(&place);
                fs::create_dir(&place).unwrap();
            }
            _ => {}
        }
    }
    for (path, op) in ops {
        let place = root.join(path);
        let was_dir = fs::symlink_metadata(&place).map(|status| status.is_dir());
        let is_dir = matches!(op, Op::Directory | Op::Opaque);
        if !matches!(op, Op::Whiteout) && was_dir.is_ok_and(|was_dir| was_dir != is_dir) {
            remove(&place);
        }
    }
    let mut child = Command::new("tar")
        .args([
            "--extract",
            "--exclude=.wh.*",
            "--no-same-owner",
            "--directory",
        ])
        .arg(root)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    io::Write::write_all(&mut child.stdin.take().unwrap(), tar).unwrap();
    assert!(child.wait().unwrap().success());
}

type Seen = BTreeMap<String, (String, Vec<u8>)>;

/// Kind and content of everything, and for files with several names the first of them.
fn look(root: &Path) -> Seen {
    let mut seen = Seen::new();
    let mut first: BTreeMap<u64, String> = BTreeMap::new();
    let mut left = vec![String::new()];
    let mut all = Vec::new();
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(root.join(&dir)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let path = if dir.is_empty() {
                name
            } else {
                format!("{dir}/{name}")
            };
            if fs::symlink_metadata(root.join(&path)).unwrap().is_dir() {
                left.push(path.clone());
            }
            all.push(path);
        }
    }
    all.sort();
    for path in all {
        let place = root.join(&path);
        let status = fs::symlink_metadata(&place).unwrap();
        let said = if status.is_dir() {
            ("directory".to_owned(), Vec::new())
        } else if status.is_symlink() {
            (
                "link".to_owned(),
                fs::read_link(&place)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes(),
            )
        } else {
            let same = first.entry(status.ino()).or_insert_with(|| path.clone());
            (
                format!("file, {} names, {same}", status.nlink()),
                fs::read(&place).unwrap(),
            )
        };
        seen.insert(path, said);
    }
    seen
}

/// The same of an image.
fn look_into(image: &[u8]) -> Seen {
    let found = Image(image).read();
    let mut names: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (path, (inode, _)) in &found {
        names
            .entry(*inode)
            .or_default()
            .push(&path[path.len().min(1)..]);
    }
    let said = found.iter().map(|(path, (inode, thing))| {
        let said = match &thing.content {
            Content::Directory => ("directory".to_owned(), Vec::new()),
            Content::Symlink(target) => ("link".to_owned(), target.clone().into_bytes()),
            Content::File(bytes) => {
                let names = &names[inode];
                (
                    format!("file, {} names, {}", names.len(), names[0]),
                    bytes.clone(),
                )
            }
            other => panic!("{other:?}"),
        };
        (path[path.len().min(1)..].to_owned(), said)
    });
    said.filter(|(path, _)| !path.is_empty()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn layers_are_what_tar_makes_of_them(stack in prop::collection::vec(layer(), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let reference = dir.path().join("reference");
        fs::create_dir(&reference).unwrap();
        let mut tars = Vec::new();
        for (ops, _) in &stack {
            let tar = tar_of(ops);
            unpack(&reference, ops, &tar);
            tars.push(tar);
        }
        let image = apply(&tars, Limits::NONE).unwrap();
        prop_assert_eq!(look_into(&image), look(&reference));
    }
}
