//! How guests run: in the best way that works on this host, and it is said why.

use std::fs::File;

use smolvm_testkit::Home;

#[test]
fn guests_run_in_the_best_way_that_works_and_it_is_said_why() {
    let home = Home::new(1);
    // Its exit code is about programs that other tests need.
    let doctor = home.smolvm(["--json", "doctor"]).run().json();
    let said = |name: &str| doctor["data"][name].as_str().unwrap_or_default().to_owned();
    let (resolved, reason) = (said("accel_resolved"), said("accel_reason"));
    assert!(reason.contains("/dev/kvm"), "{reason}");
    let opens = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    // The KVM lab says what it is. Elsewhere this is known: what does not open does not work.
    match std::env::var("SMOLVM_TEST_KVM").as_deref() {
        Ok("works") => assert_eq!(resolved, "kvm", "{reason}"),
        _ if !opens => assert_eq!(resolved, "emulation", "{reason}"),
        _ => {}
    }
    let works = resolved == "kvm";
    assert_eq!(reason.contains("a probe ran guest code"), works, "{reason}");

    home.create("box", &[]);
    assert_eq!(home.info("box").json["accel"], resolved.as_str());
    let open = format!("/proc/{}/fd", home.info("box").vmm().pid());
    let uses_kvm = std::fs::read_dir(open)
        .expect("the machine's descriptors")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .any(|target| target.ends_with("kvm"));
    assert_eq!(uses_kvm, works);
    home.rm(&["box"]);

    if !works {
        home.smolvm(["--accel", "kvm", "create"])
            .run()
            .expect(1)
            .complains_of(&["does not work here", "/dev/kvm", "leave --accel out"]);
    }
    home.is_clean();
}
