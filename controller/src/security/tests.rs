#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use tgb_aws::values::RuleProtocol;

fn rule(port: u16, source: &str) -> Permission {
    let source = Source::SecurityGroup(source.to_owned());
    Permission { protocol: RuleProtocol::Tcp, from_port: port, to_port: port, source }
}

fn set(rules: &[Permission]) -> BTreeSet<Permission> {
    rules.iter().cloned().collect()
}

fn claim(rules: &[Permission]) -> Claim {
    Claim { rules: BTreeMap::from([("sg-n".to_owned(), set(rules))]), ..Claim::default() }
}

fn error(code: &str) -> AwsError {
    AwsError { operation: "Test", code: code.to_owned(), message: code.to_owned() }
}

const DENIED: &str = "UnauthorizedOperation";

fn progress(state: State, ours: &[Permission]) -> Progress {
    Progress { done: 1, state: Some(Arc::new(state)), ours: set(ours) }
}

#[test]
fn a_binding_whose_targets_are_not_known_keeps_what_it_had_and_what_its_spec_could_ask_for() {
    let assumed = set(&[rule(80, "sg-a"), rule(443, "sg-a")]);
    assert_eq!(kept(None, &assumed), Claim::keeping(assumed.clone()));
    // Part of its targets were found before; the spec no longer asks for 22.
    let old = Claim { keep: assumed.clone(), ..claim(&[rule(80, "sg-a"), rule(22, "sg-a")]) };
    assert_eq!(kept(Some(&old), &assumed), Claim { keep: assumed.clone(), ..claim(&[rule(80, "sg-a")]) });
    assert_eq!(kept(Some(&claim(&[rule(22, "sg-a")])), &assumed), Claim::keeping(assumed));
}

#[test]
fn a_paused_binding_adds_nothing_and_loses_nothing() {
    let old = Claim { keep: set(&[rule(22, "sg-a")]), ..claim(&[rule(80, "sg-a")]) };
    let found = paused(Some(&old), &set(&[rule(443, "sg-a")]));
    assert_eq!(found, Claim::keeping(set(&[rule(22, "sg-a"), rule(80, "sg-a"), rule(443, "sg-a")])));
}

#[test]
fn a_deletion_is_held_up_only_by_groups_that_hold_rules_which_nobody_else_wants() {
    let (mine, theirs) = (rule(80, "sg-a"), rule(90, "sg-b"));
    let had = claim(std::slice::from_ref(&mine));
    let unlooked = Claim::keeping(set(std::slice::from_ref(&mine)));
    let ours = |rules: &[Permission]| Some(set(rules));
    let state = |ours, stale: &[Permission], code: Option<&str>| State {
        ours,
        stale: set(stale),
        error: code.map(error),
        ..State::default()
    };
    let (both, none): (&[Permission], &[Permission]) = (&[mine.clone(), theirs.clone()], &[]);
    for (what, had, progress, holds) in [
        ("all is well", &had, progress(state(ours(none), none, None), none), false),
        (
            "its rule could not be taken away",
            &had,
            progress(state(ours(both), both, Some(DENIED)), both),
            true,
        ),
        (
            "another's rule could not",
            &had,
            progress(state(ours(both), std::slice::from_ref(&theirs), Some(DENIED)), both),
            false,
        ),
        (
            "the group is gone",
            &had,
            progress(state(ours(none), none, Some("InvalidGroup.NotFound")), none),
            false,
        ),
        ("it can't be read and held none", &had, progress(state(None, none, Some(DENIED)), none), false),
        ("it can't be read and held its rule", &had, progress(state(None, none, Some(DENIED)), both), true),
        (
            "whether a rule was added is not known",
            &had,
            progress(state(None, none, Some("Unreachable")), none),
            true,
        ),
        (
            "another group does not answer",
            &unlooked,
            progress(state(None, none, Some("Unreachable")), none),
            false,
        ),
        (
            "after a restart, its rule is stuck",
            &unlooked,
            progress(state(ours(both), both, Some(DENIED)), both),
            true,
        ),
    ] {
        assert_eq!(hindered(&progress, "sg-n", had, false).is_some(), holds, "{what}");
    }
}

#[test]
fn a_deletion_that_retains_its_rules_waits_until_none_of_them_is_ours() {
    let mine = rule(80, "sg-a");
    let had = claim(std::slice::from_ref(&mine));
    let ours = set(std::slice::from_ref(&mine));
    let state = |unretained: bool, code: Option<&str>| State {
        ours: Some(ours.clone()),
        unretained: unretained.then(|| (ours.clone(), error(DENIED))),
        error: code.map(error),
        ..State::default()
    };
    for (state, holds) in [
        (state(false, None), false),
        (state(true, None), true),
        (state(false, Some(DENIED)), true),
        (State { ours: Some(BTreeSet::new()), error: Some(error(DENIED)), ..State::default() }, false),
    ] {
        let found = hindered(&progress(state.clone(), &[]), "sg-n", &had, true);
        assert_eq!(found.is_some(), holds, "{state:?}");
    }
}

#[test]
fn a_rule_that_cannot_be_taken_away_is_told_by_whoever_uses_or_used_the_group() {
    let (wanted, stale) = (rule(80, "sg-a"), rule(90, "sg-a"));
    let state = State {
        rules: set(&[wanted.clone(), stale.clone()]),
        stale: set(&[stale]),
        error: Some(error(DENIED)),
        ..State::default()
    };
    let told = |claim: &Claim| match standing_in(claim, "sg-n", Some(&state)) {
        Standing::Authorized { stale, .. } => stale.unwrap(),
        other => panic!("{other:?}"),
    };
    let (reason, said) = told(&claim(&[wanted]));
    assert_eq!(reason, Reason::AccessDenied);
    assert_eq!(
        said,
        "sg-n still opens what nobody asks for (tcp 90 from sg-a): Test: UnauthorizedOperation: UnauthorizedOperation"
    );
    assert_eq!(told(&Claim::default()), (reason, said), "also by one that has left the group");
    let missing = standing_in(&claim(&[rule(443, "sg-a")]), "sg-n", Some(&state));
    assert!(matches!(missing, Standing::Failed(Reason::AccessDenied, _)), "{missing:?}");
}

#[test]
fn errors_are_called_what_they_are() {
    for (code, reason) in [
        ("UnauthorizedOperation", Reason::AccessDenied),
        ("AuthFailure", Reason::AccessDenied),
        ("NoCredentials", Reason::AccessDenied),
        ("InvalidParameterValue", Reason::RulesRejected),
        ("InvalidPermission.Malformed", Reason::RulesRejected),
        ("InvalidGroup.NotFound", Reason::SecurityGroupNotFound),
        ("RulesPerSecurityGroupLimitExceeded", Reason::RuleLimitExceeded),
        ("RequestLimitExceeded", Reason::AwsUnavailable),
        ("Unreachable", Reason::AwsUnavailable),
    ] {
        assert_eq!(reason_of(&error(code)), reason, "{code}");
    }
}
