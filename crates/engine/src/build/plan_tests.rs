use super::*;

/// Images `a` and `b`, and files whose content is their name.
struct Fake {
    asked: Vec<String>,
    /// Content of every file.
    content: String,
}

impl Sources for Fake {
    fn image(&mut self, name: &str) -> Result<Base> {
        self.asked.push(name.to_owned());
        if !["a", "b", SCRATCH].contains(&name) {
            return Err(
                Error::new(ErrorKind::NotFound, format!("there is no `{name}`")).hint("look"),
            );
        }
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        Ok(Base {
            name: name.to_owned(),
            digest: format!("sha256:{name}"),
            config: ImageConfig {
                user: Some("app".to_owned()),
                workdir: Some("/srv".to_owned()),
                env: vec![pair("PATH", "/bin"), pair("OF", "base")],
                cmd: vec!["base".to_owned()],
                ..ImageConfig::default()
            },
        })
    }

    fn find(&mut self, source: &str, _: bool) -> Result<Vec<Found>> {
        if source == "none" {
            return Err(Error::new(ErrorKind::NotFound, "there is no `none`"));
        }
        Ok(vec![Found::inline(source, self.content.clone())])
    }
}

fn fake() -> Fake {
    Fake {
        asked: Vec::new(),
        content: "1".to_owned(),
    }
}

fn planned(text: &str, choices: &Choices<'_>, sources: &mut Fake) -> Result<Plan> {
    let file = Dockerfile::parse(text, "Dockerfile")?;
    plan(&file, choices, sources)
}

fn good(text: &str) -> Plan {
    planned(text, &Choices::default(), &mut fake())
        .unwrap_or_else(|error| panic!("{text}: {}", error.in_one_line()))
}

fn last(plan: &Plan) -> &PlannedStage {
    plan.stages.last().expect("a stage")
}

fn end(text: &str) -> String {
    last(&good(text)).end().to_owned()
}

fn runs(plan: &Plan) -> Vec<&RunAction> {
    let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
    steps
        .filter_map(|step| match &step.action {
            Some((_, Action::Run(run))) => Some(run),
            _ => None,
        })
        .collect()
}

fn args(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |&(a, b): &(&str, &str)| (a.to_owned(), b.to_owned());
    pairs.iter().map(owned).collect()
}

#[test]
fn what_an_image_says_is_the_bases_with_what_is_said_here() {
    let plan = good(
        "FROM a\nENV A=1 OF=here\nENV B=$A-$OF A=2\nWORKDIR sub/../x\nUSER ${NONE:-web}\n\
         LABEL v=1\nLABEL v=\"2 $A\"\nEXPOSE 80 53/udp 8000-8001\n",
    );
    let config = &last(&plan).config;
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(
        config.env,
        [
            pair("PATH", "/bin"),
            pair("OF", "here"),
            pair("A", "2"),
            // As it was before the instruction.
            pair("B", "1-here")
        ]
    );
    assert_eq!(config.workdir.as_deref(), Some("/srv/x"));
    assert_eq!(config.user.as_deref(), Some("web"));
    assert_eq!(config.labels, [pair("v", "2 2")]);
    assert_eq!(config.ports, ["80/tcp", "53/udp", "8000/tcp", "8001/tcp"]);
    assert_eq!(config.cmd, ["base"]);
}

#[test]
fn commands_are_lines_for_the_shell_or_words() {
    let config = |text: &str| last(&good(&format!("FROM a\n{text}"))).config.clone();
    assert_eq!(config("CMD echo $A").cmd, ["/bin/sh", "-c", "echo $A"]);
    assert_eq!(
        config("SHELL [\"/bin/bash\", \"-ec\"]\nCMD x").cmd,
        ["/bin/bash", "-ec", "x"]
    );
    // Whoever says what is run does not mean the arguments that the base has.
    let entry = config("ENTRYPOINT [\"/x\"]");
    assert_eq!(entry.entrypoint, ["/x"]);
    assert!(entry.cmd.is_empty());
    assert_eq!(config("CMD [\"y\"]\nENTRYPOINT [\"/x\"]").cmd, ["y"]);
}

#[test]
fn commands_see_arguments_and_environment() {
    let text = "ARG V=9\nARG W=$V.1\nFROM a\nARG V\nARG W\nARG X=$V\nARG OF\nARG TARGETARCH\nENV V=env\nRUN x";
    let given = args(&[("V", "7"), ("OTHER", "1"), ("HTTP_PROXY", "p")]);
    let choices = Choices {
        args: &given,
        target: None,
    };
    let plan = planned(text, &choices, &mut fake()).expect("a plan");
    let run = runs(&plan)[0];
    let value = |name: &str| {
        let mut env = run.env.iter();
        env.find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    };
    assert_eq!(value("V"), Some("env"));
    assert_eq!(value("W"), Some("7.1"));
    assert_eq!(value("X"), Some("7"));
    assert_eq!(value("OF"), Some("base"));
    assert_eq!(
        value("TARGETARCH"),
        Some(Platform::of_guests().architecture.as_str())
    );
    assert_eq!(value("HTTP_PROXY"), Some("p"));
    assert_eq!(run.user.as_deref(), Some("app"));
    assert_eq!(run.workdir, "/srv");
    assert_eq!(
        plan.warnings,
        ["nothing in Dockerfile uses the build argument `OTHER`"]
    );
}

#[test]
fn only_what_is_needed_is_planned() {
    let text = "FROM a AS one\nRUN x\nFROM nowhere AS two\nRUN y\nFROM one AS three\nRUN z\n\
                FROM b\nCOPY --from=three /x /\nCOPY --from=0 /y /\nCOPY --from=a /z /\n";
    let mut sources = fake();
    let plan = planned(text, &Choices::default(), &mut sources).expect("a plan");
    let labels: Vec<_> = plan
        .stages
        .iter()
        .map(|stage| stage.text.as_str())
        .collect();
    assert_eq!(labels, ["FROM a AS one", "FROM one AS three", "FROM b"]);
    assert_eq!(plan.stages[1].parent, Some(0));
    assert_eq!(plan.stages[1].root.digest, "sha256:a");
    assert_eq!(sources.asked, ["a", "b", "a"]);
    let froms: Vec<_> = last(&plan)
        .steps
        .iter()
        .map(|step| match &step.action {
            Some((_, Action::CopyFrom { from, .. })) => from.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(froms[..2], [Origin::Stage(1), Origin::Stage(0)]);
    assert!(matches!(&froms[2], Origin::Image(image) if image.digest == "sha256:a"));

    for (target, stages) in [("one", 1), ("THREE", 2), ("0", 1)] {
        let choices = Choices {
            args: &[],
            target: Some(target),
        };
        let plan = planned(text, &choices, &mut fake()).expect(target);
        assert_eq!(plan.stages.len(), stages, "{target}");
    }
    let choices = Choices {
        args: &[],
        target: Some("four"),
    };
    let error = planned(text, &choices, &mut fake()).expect_err("no such stage");
    assert_eq!(error.hint_text(), Some("its stages are one, two, three"));
}

#[test]
fn a_key_is_everything_that_an_outcome_depends_on() {
    let same = end("FROM a\nENV A=1\nRUN x\n");
    for text in [
        "# c\nFROM a AS n\nENV A=1\nRUN x\n",
        "FROM a\nENV A=1\nRUN x\nENV B=2\nLABEL c=d\nCMD e\nEXPOSE 1\nUSER f\n",
        "FROM a\nENV A=0\nENV A=1\nRUN x\n",
    ] {
        assert_eq!(end(text), same, "{text}");
    }
    for text in [
        "FROM b\nENV A=1\nRUN x\n",
        "FROM a\nENV A=2\nRUN x\n",
        "FROM a\nENV A=1\nRUN y\n",
        "FROM a\nENV A=1\nARG B=1\nRUN x\n",
        "FROM a\nENV A=1\nUSER u\nRUN x\n",
        "FROM a\nENV A=1\nWORKDIR /\nRUN x\n",
        "FROM a\nENV A=1\nRUN [\"x\"]\n",
        "FROM a\nENV A=1\nRUN w\nRUN x\n",
        "FROM a\nRUN x\n",
    ] {
        assert_ne!(end(text), same, "{text}");
    }
    // Proxies are how the network is reached.
    let proxied = args(&[("https_proxy", "p")]);
    let choices = Choices {
        args: &proxied,
        target: None,
    };
    let plan = planned("FROM a\nENV A=1\nRUN x\n", &choices, &mut fake()).expect("a plan");
    assert_eq!(last(&plan).end(), same);
    assert!(
        runs(&plan)[0]
            .env
            .iter()
            .any(|(name, _)| name == "https_proxy")
    );
}

#[test]
fn a_copy_has_the_key_of_what_is_copied() {
    let key = |text: &str, content: &str| {
        let mut sources = fake();
        content.clone_into(&mut sources.content);
        let plan = planned(text, &Choices::default(), &mut sources).expect(text);
        last(&plan).end().to_owned()
    };
    let same = key("FROM a\nCOPY f /d/\n", "1");
    assert_eq!(key("FROM a\nCOPY f /x/../d/\n", "1"), same);
    for (text, content) in [
        ("FROM a\nCOPY f /d/\n", "2"),
        ("FROM a\nCOPY g /d/\n", "1"),
        ("FROM a\nCOPY f /d\n", "1"),
        ("FROM a\nCOPY --chown=1 f /d/\n", "1"),
        ("FROM a\nCOPY --chmod=700 f /d/\n", "1"),
        ("FROM a\nCOPY f f /d/\n", "1"),
        ("FROM b AS o\nRUN x\nFROM a\nCOPY --from=o f /d/\n", "1"),
    ] {
        assert_ne!(key(text, content), same, "{text} {content}");
    }
    let of_stage = |run: &str| {
        key(
            &format!("FROM b AS o\nRUN {run}\nFROM a\nCOPY --from=o f /d/\n"),
            "1",
        )
    };
    assert_ne!(of_stage("x"), of_stage("y"));
}

#[test]
fn destinations_are_paths_in_the_guest() {
    for (dest, path, directory) in [
        ("/d/", "/d", true),
        ("d", "/srv/d", false),
        (".", "/srv", true),
        ("./", "/srv", true),
        ("/", "/", true),
        ("../../..", "/", true),
        ("$OF/x", "/srv/base/x", false),
    ] {
        let plan = good(&format!("FROM a\nCOPY f {dest}\n"));
        let Some((_, Action::Copy { to, .. })) = &last(&plan).steps[0].action else {
            panic!("no copy");
        };
        assert_eq!(
            (to.path.as_str(), to.directory),
            (path, directory),
            "{dest}"
        );
    }
}

#[test]
fn here_documents_have_their_variables() {
    let plan = good("FROM a\nCOPY <<E /d\n\"$OF\" 'x' \\$OF\nE\n");
    let Some((key, Action::Copy { found, .. })) = &last(&plan).steps[0].action else {
        panic!("no copy");
    };
    assert_eq!(
        *found,
        [Found::inline("E", "\"base\" 'x' $OF\n".to_owned())]
    );
    let quoted = good("FROM a\nCOPY <<'E' /d\n\"base\" 'x' $OF\nE\n");
    let Some((other, Action::Copy { found, .. })) = &last(&quoted).steps[0].action else {
        panic!("no copy");
    };
    // The same text is the same file, however it was written.
    assert_eq!(
        *found,
        [Found::inline("E", "\"base\" 'x' $OF\n".to_owned())]
    );
    assert_eq!(key, other);
}

#[test]
fn what_cannot_be_is_told_with_its_line() {
    for (text, kind, why) in [
        (
            "FROM nowhere",
            ErrorKind::NotFound,
            "Dockerfile, line 1: the image `nowhere` is not to be had",
        ),
        (
            "ARG A\nFROM $A",
            ErrorKind::InvalidInput,
            "Dockerfile, line 2: `$A` comes to nothing",
        ),
        (
            "FROM --platform=linux/riscv64 a",
            ErrorKind::Unsupported,
            "Dockerfile, line 1: `--platform=linux/riscv64` is not that of guests here",
        ),
        (
            "FROM a\nRUN x\nCOPY none /",
            ErrorKind::NotFound,
            "Dockerfile, line 3: there is no `none`",
        ),
        (
            "FROM a\nCOPY --from=two x /\nFROM b AS two",
            ErrorKind::InvalidInput,
            "",
        ),
        (
            "FROM a\nCOPY --from=later x /",
            ErrorKind::NotFound,
            "Dockerfile, line 2: the image `later` is not to be had",
        ),
        (
            "FROM a\nWORKDIR ${A:?set A}",
            ErrorKind::InvalidInput,
            "Dockerfile, line 2: `A` has no value: set A",
        ),
        (
            "FROM a\nENV A='x",
            ErrorKind::InvalidInput,
            "Dockerfile, line 2: a single quote is not closed",
        ),
        (
            "FROM a\nEXPOSE x",
            ErrorKind::InvalidInput,
            "Dockerfile, line 2: `x` is no port",
        ),
        (
            "FROM a\nUSER $A",
            ErrorKind::InvalidInput,
            "Dockerfile, line 2: `USER` comes to nothing",
        ),
    ] {
        let result = planned(text, &Choices::default(), &mut fake());
        if why.is_empty() {
            // The first stage is not needed, so nothing in it is looked at.
            assert!(result.is_ok(), "{text}");
            continue;
        }
        let error = result.expect_err(text);
        assert_eq!(error.kind(), kind, "{text}");
        assert!(error.to_string().starts_with(why), "{text}: {error}");
    }
}
