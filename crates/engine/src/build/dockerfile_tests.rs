use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Dockerfile {
    Dockerfile::parse(text, "Dockerfile").unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The only step of a file with one stage.
fn one(text: &str) -> Instruction {
    let file = parse(&format!("FROM a\n{text}\n"));
    let [step] = &file.stages[0].steps[..] else {
        panic!("{text}: {:?}", file.stages[0].steps);
    };
    step.what.clone()
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn shell(line: &str) -> Command {
    Command::Shell(line.to_owned())
}

#[test]
fn stages_have_their_instructions_and_lines() {
    let file = parse(
        "# syntax=docker/dockerfile:1\n\
         ARG VERSION=12\n\
         \n\
         FROM --platform=$BUILDPLATFORM debian:$VERSION AS Build\n\
         # a comment\n\
         run make \\\n\
         # a comment in between\n\
         \n\
         \x20   -j2 && \\\n\
         \x20   true\n\
         FROM scratch\n\
         COPY --from=build --chown=1:2 --chmod=755 a b/ c/\n",
    );
    assert_eq!(file.args[0].place, Place::Line(2));
    let [build, last] = &file.stages[..] else {
        panic!("{file:?}");
    };
    assert_eq!(
        (build.base.as_str(), build.name.as_deref()),
        ("debian:$VERSION", Some("build"))
    );
    assert_eq!(build.platform.as_deref(), Some("$BUILDPLATFORM"));
    assert_eq!(build.steps[0].place, Place::Line(6));
    assert_eq!(build.steps[0].text, "run make -j2 && true");
    assert_eq!(
        build.steps[0].what,
        Instruction::Run(Run::Command(shell("make     -j2 &&     true")))
    );
    assert_eq!((last.base.as_str(), &last.name), ("scratch", &None));
    assert_eq!(
        last.steps[0].what,
        Instruction::Copy(Copy {
            add: false,
            from: Some("build".to_owned()),
            chown: Some("1:2".to_owned()),
            chmod: Some(0o755),
            sources: vec![Source::Path("a".to_owned()), Source::Path("b/".to_owned())],
            dest: "c/".to_owned(),
        })
    );
    assert_eq!(file.warnings, Vec::<String>::new());
}

#[test]
fn commands_have_two_forms() {
    assert_eq!(
        one(r#"CMD ["a", "b c"]"#),
        Instruction::Cmd(Command::Exec(owned(&["a", "b c"])))
    );
    assert_eq!(
        one("ENTRYPOINT exec a $B"),
        Instruction::Entrypoint(shell("exec a $B"))
    );
    // What is no JSON is a line for the shell, as a test is.
    assert_eq!(
        one("RUN [ -e /a ] && b"),
        Instruction::Run(Run::Command(shell("[ -e /a ] && b")))
    );
    assert_eq!(
        one(r#"SHELL ["/bin/bash", "-c"]"#),
        Instruction::Shell(owned(&["/bin/bash", "-c"]))
    );
    assert_eq!(
        one(r#"COPY ["a b", "/c d/"]"#),
        Instruction::Copy(Copy {
            add: false,
            from: None,
            chown: None,
            chmod: None,
            sources: vec![Source::Path("a b".to_owned())],
            dest: "/c d/".to_owned(),
        })
    );
}

#[test]
fn variables_are_pairs_or_a_name_and_the_rest() {
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(
        one(r#"ENV A=1 B="x y" C=d\ e"#),
        Instruction::Env(vec![
            pair("A", "1"),
            pair("B", "\"x y\""),
            pair("C", r"d\ e")
        ])
    );
    assert_eq!(
        one("ENV A  x = y"),
        Instruction::Env(vec![pair("A", "x = y")])
    );
    assert_eq!(
        one("LABEL org.a=\"b c\""),
        Instruction::Label(vec![pair("org.a", "\"b c\"")])
    );
    assert_eq!(
        one("ARG A B=2 C="),
        Instruction::Arg(vec![
            ("A".to_owned(), None),
            ("B".to_owned(), Some("2".to_owned())),
            ("C".to_owned(), Some(String::new())),
        ])
    );
}

#[test]
fn here_documents_are_scripts_files_and_input() {
    assert_eq!(
        one("RUN <<EOF\nset -e\n  echo $A\nEOF"),
        Instruction::Run(Run::Command(shell("set -e\n  echo $A\n")))
    );
    assert_eq!(
        one("RUN <<EOF\n#!/usr/bin/env python3\nprint(1)\nEOF"),
        Instruction::Run(Run::Script("#!/usr/bin/env python3\nprint(1)\n".to_owned()))
    );
    // Not at the beginning, and two of them: the shell reads them.
    assert_eq!(
        one("RUN cat <<A - <<'B' > /x\none\nA\n$two\nB"),
        Instruction::Run(Run::Command(shell(
            "cat <<A - <<'B' > /x\none\nA\n$two\nB\n"
        )))
    );
    let document = |name: &str, text: &str, expand| {
        Source::Inline(HereDocument {
            name: name.to_owned(),
            text: text.to_owned(),
            expand,
        })
    };
    let Instruction::Copy(copy) = one("COPY <<-one <<\"two\" /d/\n\t\ta $B\n\tone\n# b\ntwo")
    else {
        panic!("no copy");
    };
    assert_eq!(
        copy.sources,
        [
            document("one", "a $B\n", true),
            document("two", "# b\n", false)
        ]
    );
    // An arithmetic shift and a here-string announce nothing.
    for line in ["RUN echo $((1 << 2))", "RUN cat <<< x"] {
        assert_eq!(
            one(line),
            Instruction::Run(Run::Command(shell(line.trim_start_matches("RUN "))))
        );
    }
}

#[test]
fn another_escape_character_may_be_chosen() {
    let file = parse("# escape=`\nFROM a\nRUN a `\n  b\\\nRUN c\n");
    let lines: Vec<_> = file.stages[0]
        .steps
        .iter()
        .map(|step| step.what.clone())
        .collect();
    let run = |line: &str| Instruction::Run(Run::Command(shell(line)));
    assert_eq!(lines, [run("a   b\\"), run("c")]);
    assert_eq!(file.escape, '`');
}

#[test]
fn what_makes_no_other_image_is_left_out_with_a_warning() {
    let file = parse(
        "FROM a\nHEALTHCHECK CMD true\nSTOPSIGNAL 9\nVOLUME /d\n\
         RUN --mount=type=cache,target=/root/.cache pip install x\nMAINTAINER a b\n",
    );
    assert_eq!(file.warnings.len(), 4);
    assert!(file.warnings[0].starts_with("Dockerfile, line 2: `HEALTHCHECK` is left out"));
    assert!(
        file.warnings[3]
            .starts_with("Dockerfile, line 5: `--mount=type=cache,target=/root/.cache`")
    );
    assert_eq!(file.stages[0].steps.len(), 2);
}

#[test]
fn what_cannot_be_done_is_refused_with_its_line() {
    use ErrorKind::{InvalidInput, Unsupported};
    for (text, kind, why) in [
        ("", InvalidInput, "Dockerfile has no `FROM`"),
        (
            "# escape=x\nFROM a",
            InvalidInput,
            "Dockerfile, line 1: only a backslash or a backquote can be the escape character",
        ),
        (
            "RUN a\nFROM b",
            InvalidInput,
            "Dockerfile, line 1: `RUN` stands before the first `FROM`",
        ),
        (
            "FROM a\n\nRUM b",
            InvalidInput,
            "Dockerfile, line 3: `RUM` is no instruction",
        ),
        (
            "FROM a\nRUN",
            InvalidInput,
            "Dockerfile, line 2: `RUN` has nothing behind it",
        ),
        (
            "FROM a b c",
            InvalidInput,
            "Dockerfile, line 1: `FROM` is followed by IMAGE or IMAGE AS NAME",
        ),
        (
            "FROM a AS 1",
            InvalidInput,
            "Dockerfile, line 1: `1` is no name for a stage",
        ),
        (
            "FROM a AS b\nFROM c AS B",
            InvalidInput,
            "Dockerfile, line 2: there is a stage `b` already",
        ),
        (
            "FROM a\nONBUILD RUN b",
            Unsupported,
            "Dockerfile, line 2: `ONBUILD` is not carried out by builds from this image",
        ),
        (
            "FROM a\nADD https://b/c /d",
            Unsupported,
            "Dockerfile, line 2: `ADD` of what is not in the context cannot be done here",
        ),
        (
            "FROM a\nRUN --mount=type=secret,id=x b",
            Unsupported,
            "Dockerfile, line 2: `RUN --mount=type=secret,id=x` cannot be done here",
        ),
        (
            "FROM a\nRUN --network=host b",
            Unsupported,
            "Dockerfile, line 2: `RUN --network=host` cannot be done here",
        ),
        (
            "FROM a\nCOPY --parents b c",
            Unsupported,
            "Dockerfile, line 2: `COPY --parents` cannot be done here",
        ),
        (
            "FROM a\nCOPY --chmod=u+x b c",
            Unsupported,
            "Dockerfile, line 2: `--chmod=u+x` is no octal number",
        ),
        (
            "FROM a\nCOPY --from=$b c d",
            Unsupported,
            "Dockerfile, line 2: `--from` may have no variables",
        ),
        (
            "FROM a\nCOPY b",
            InvalidInput,
            "Dockerfile, line 2: `COPY` is followed by SOURCE… DESTINATION",
        ),
        (
            "FROM a\nENV A",
            InvalidInput,
            "Dockerfile, line 2: `ENV A` has no value",
        ),
        (
            "FROM a\nENV A=1 B",
            InvalidInput,
            "Dockerfile, line 2: `B` in `ENV` is no NAME=VALUE",
        ),
        (
            "FROM a\nARG 1A",
            InvalidInput,
            "Dockerfile, line 2: `1A` is no name of an argument",
        ),
        (
            "FROM a\nSHELL bash",
            InvalidInput,
            "Dockerfile, line 2: `SHELL` is followed by a list in JSON",
        ),
        (
            "FROM a\nRUN <<EOF\nb",
            InvalidInput,
            "Dockerfile, line 2: the here-document does not end with `EOF`",
        ),
    ] {
        let error = Dockerfile::parse(text, "Dockerfile").expect_err(text);
        assert_eq!(
            (error.kind(), error.to_string()),
            (kind, why.to_owned()),
            "{text}"
        );
    }
}

/// Instructions on one line each.
fn instructions() -> impl Strategy<Value = Vec<String>> {
    let word = "[a-z/.$=]{1,8}";
    let line = prop_oneof![
        (word, word).prop_map(|(a, b)| format!("RUN {a} {b}")),
        (word, word).prop_map(|(a, b)| format!("COPY {a} {b}")),
        word.prop_map(|a| format!("WORKDIR {a}")),
        ("[A-Z]{1,4}", word).prop_map(|(a, b)| format!("ENV {a}={b}")),
    ];
    prop::collection::vec(line, 0..8)
}

proptest! {
    /// Where lines are cut, and which comments and empty lines stand in between, changes nothing.
    #[test]
    fn lines_may_be_cut_at_blanks(
        lines in instructions(),
        filler in prop::sample::select(vec!["", "\n", "# c \\\n", " \n  #\n"]),
    ) {
        let plain = format!("FROM a\n{}", lines.iter().map(|line| format!("{line}\n")).collect::<String>());
        let cut = plain.replace(' ', &format!(" \\\n{filler}"));
        let what = |text: &str| -> Vec<Instruction> {
            let stages = parse(text).stages;
            stages[0].steps.iter().map(|step| step.what.clone()).collect()
        };
        prop_assert_eq!(what(&plain), what(&cut));
        prop_assert_eq!(what(&plain).len(), lines.len());
    }

    #[test]
    fn any_text_is_a_dockerfile_or_refused(text in r#"(FROM |RUN |COPY |ENV |<<E|E|a|"|'|\\|\[|\n|`|=| |#|--x=|\$){0,40}"#) {
        let _ = Dockerfile::parse(&text, "Dockerfile");
        let _ = Dockerfile::parse(&format!("FROM a\n{text}"), "Dockerfile");
    }
}
