//! Users and groups, from the files of the guest's root.
//!
//! Never by NSS: a static glibc would load the guest's libraries for that, if there are any.

use smolvm_proto::message::{Failure, FailureKind};

use crate::failure::failure;

/// Who a command runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Login name; the number if there is none.
    pub(crate) name: String,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// A line of passwd(5).
#[derive(Debug, Clone, PartialEq, Eq)]
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

/// A line of group(5).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        Some(User {
            name,
            uid: fields.next()?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
            home: fields.nth(1).unwrap_or(""),
            shell: fields.next().unwrap_or(""),
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        Some(Group {
            name,
            gid: fields.next()?.parse().ok()?,
            members: fields.next().unwrap_or(""),
        })
    })
}

/// Reads the guest's files and finds who `wanted` is.
pub(crate) fn look_up(wanted: &str) -> Result<Identity, Failure> {
    find(wanted, &text("/etc/passwd"), &text("/etc/group"))
}

/// Users of the guest's files, each with its number and its name.
pub(crate) fn user_names() -> Vec<(u32, String)> {
    users(&text("/etc/passwd"))
        .map(|user| (user.uid, user.name.to_owned()))
        .collect()
}

/// The same of groups.
pub(crate) fn group_names() -> Vec<(u32, String)> {
    groups(&text("/etc/group"))
        .map(|group| (group.gid, group.name.to_owned()))
        .collect()
}

/// A file's text; empty if there is none.
fn text(path: &str) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// Finds `name`, `uid`, `name:group` or `uid:gid`.
///
/// A name goes before a number that is written the same, and a number needs no entry, as with
/// `docker exec --user`. Whoever names a group gets that one only.
fn find(wanted: &str, passwd: &str, group: &str) -> Result<Identity, Failure> {
    let (who, of) = match wanted.split_once(':') {
        Some((who, of)) => (who, Some(of)),
        None => (wanted, None),
    };
    let no_such = |what: &str| {
        failure(
            FailureKind::NoSuchUser,
            format!("user {wanted:?}: there is no {what} in the guest"),
        )
    };
    let number = |text: &str| text.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    let known = users(passwd)
        .find(|user| user.name == who)
        .or_else(|| users(passwd).find(|user| Some(user.uid) == number(who)));
    let mut identity = match known {
        Some(user) => Identity {
            uid: user.uid,
            gid: user.gid,
            groups: Vec::new(),
            name: user.name.to_owned(),
            home: or(user.home, "/"),
            shell: or(user.shell, "/bin/sh"),
        },
        // An image without /etc/passwd still has a root.
        None if who == "root" || who == "0" => Identity {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            name: "root".to_owned(),
            home: "/root".to_owned(),
            shell: "/bin/sh".to_owned(),
        },
        None => Identity {
            uid: number(who).ok_or_else(|| no_such(&format!("user {who:?}")))?,
            gid: 0,
            groups: Vec::new(),
            name: who.to_owned(),
            home: "/".to_owned(),
            shell: "/bin/sh".to_owned(),
        },
    };
    if let Some(of) = of {
        identity.gid = groups(group)
            .find(|group| group.name == of)
            .map(|group| group.gid)
            .or_else(|| number(of))
            .ok_or_else(|| no_such(&format!("group {of:?}")))?;
        identity.groups = vec![identity.gid];
    } else {
        identity.groups = vec![identity.gid];
        for group in groups(group) {
            let is_member = group
                .members
                .split(',')
                .any(|member| member.trim() == identity.name);
            if is_member && !identity.groups.contains(&group.gid) {
                identity.groups.push(group.gid);
            }
        }
    }
    Ok(identity)
}

fn or(text: &str, default: &str) -> String {
    if text.is_empty() { default } else { text }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n\
        broken line\n\
        also:x:not-a-number:0::/:\n\
        ada:x:1000:1000:Ada,,,:/home/ada:\n\
        1000:x:1500:1500::/home/odd:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:bob, ada\nada:x:1000:\nvideo:x:44:ada\nbad\n";

    #[test]
    fn names_numbers_and_groups_are_found() {
        let root = find("root", PASSWD, GROUP).expect("known");
        assert_eq!((root.uid, root.gid, root.groups), (0, 0, vec![0]));
        assert_eq!(
            (root.home.as_str(), root.shell.as_str()),
            ("/root", "/bin/bash")
        );

        let ada = find("ada", PASSWD, GROUP).expect("known");
        assert_eq!((ada.uid, ada.gid), (1000, 1000));
        assert_eq!(ada.groups, [1000, 50, 44]);
        assert_eq!(
            (ada.home.as_str(), ada.shell.as_str()),
            ("/home/ada", "/bin/sh")
        );

        let grouped = find("ada:staff", PASSWD, GROUP).expect("known");
        assert_eq!((grouped.gid, grouped.groups), (50, vec![50]));
        let numbers = find("7:8", PASSWD, GROUP).expect("numbers need no entry");
        assert_eq!(
            (numbers.uid, numbers.gid, numbers.name.as_str()),
            (7, 8, "7")
        );
    }

    #[test]
    fn a_name_that_looks_like_a_number_is_a_name() {
        assert_eq!(find("1000", PASSWD, GROUP).expect("known").uid, 1500);
        assert_eq!(find("1", PASSWD, GROUP).expect("known").name, "daemon");
    }

    #[test]
    fn an_image_without_files_has_a_root_and_numbers() {
        assert_eq!(find("root", "", "").expect("always").home, "/root");
        assert_eq!(find("12", "", "").expect("always").home, "/");
    }

    #[test]
    fn who_is_missing_is_named() {
        for (wanted, what) in [
            ("eve", "there is no user \"eve\""),
            ("ada:wheel", "there is no group \"wheel\""),
            ("", "there is no user \"\""),
            ("-1", "there is no user \"-1\""),
            ("4294967295", "there is no user"),
        ] {
            let failure = find(wanted, PASSWD, GROUP).expect_err(wanted);
            assert_eq!(failure.kind, FailureKind::NoSuchUser);
            assert!(failure.message.contains(what), "{}", failure.message);
        }
    }
}
