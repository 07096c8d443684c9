#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;
use crate::network::marker;

mod model;

fn rule(from_port: u16, to_port: u16, source: &str) -> Permission {
    let source = match source.starts_with("sg-") {
        true => Source::SecurityGroup(source.to_owned()),
        false => Source::Cidr(source.to_owned()),
    };
    Permission { protocol: RuleProtocol::Tcp, from_port, to_port, source }
}

fn there(rules: &[(&str, Permission, &str)]) -> SecurityGroupRules {
    let rule = |(id, permission, description): &(&str, Permission, &str)| Rule {
        id: (*id).to_owned(),
        permission: permission.clone(),
        description: (*description).to_owned(),
    };
    SecurityGroupRules { rules: rules.iter().map(rule).collect(), others: 0 }
}

fn claim(permissions: &[Permission]) -> Claim {
    let rules = BTreeMap::from([("sg-n".to_owned(), permissions.iter().cloned().collect())]);
    Claim { rules, ..Claim::default() }
}

fn keeping(permissions: &[Permission]) -> Claim {
    Claim::keeping(permissions.iter().cloned().collect())
}

fn retained(permissions: &[Permission]) -> Claim {
    Claim { retained_as: Some(RETAINED.to_owned()), ..claim(permissions) }
}

const RETAINED: &str = "elbv2.k8s.aws/targetGroupBinding=shared cluster:c retained:shop/web";

fn error(code: &str) -> AwsError {
    AwsError { operation: "Test", code: code.to_owned(), message: code.to_owned() }
}

/// A group that takes at most `room` rules of either family, and refuses the source `sg-bad`.
struct Group {
    rules: SecurityGroupRules,
    room: usize,
    changes: Vec<String>,
}

impl Group {
    fn new(room: usize, rules: &[(&str, Permission, &str)]) -> Self {
        Self { rules: there(rules), room, changes: Vec::new() }
    }

    fn answer(&mut self, step: &Step, ours: &str) -> Answer {
        let full = |rules: &SecurityGroupRules, room: usize| {
            let mut counts = [0, 0];
            rules.rules.iter().for_each(|rule| counted(&mut counts, &rule.permission.source));
            counts.iter().any(|count| *count > room)
        };
        match step {
            Step::Read | Step::Confirm => return Answer::Rules(self.rules.clone()),
            Step::Authorize(added) => {
                if added.iter().any(|p| p.source == Source::SecurityGroup("sg-bad".to_owned())) {
                    return Answer::Failed(error("InvalidGroup.NotFound"));
                }
                let mut after = self.rules.clone();
                for permission in added {
                    if after.rules.iter().any(|rule| rule.permission == *permission) {
                        return Answer::Failed(error(DUPLICATE));
                    }
                    let id = format!("sgr-new-{}", self.changes.len() + after.rules.len());
                    after.rules.push(Rule {
                        id,
                        permission: permission.clone(),
                        description: ours.to_owned(),
                    });
                }
                if full(&after, self.room) {
                    return Answer::Failed(error(FULL));
                }
                self.rules = after;
                self.changes.extend(added.iter().map(|p| format!("+{}-{}", p.from_port, p.to_port)));
            }
            Step::Modify(id, to) => {
                let rule = self.rules.rules.iter_mut().find(|rule| rule.id == *id).unwrap();
                let old = std::mem::replace(&mut rule.permission, to.clone());
                let ports = [old.from_port, old.to_port, to.from_port, to.to_port];
                self.changes.push(format!("{}-{}>{}-{}", ports[0], ports[1], ports[2], ports[3]));
            }
            Step::Retain(retained) => {
                for Retained { id, permission, description } in retained {
                    let rule = self.rules.rules.iter_mut().find(|rule| rule.id == *id).unwrap();
                    assert_eq!(rule.permission, *permission);
                    rule.description.clone_from(description);
                    self.changes.push(format!("={}-{}", permission.from_port, permission.to_port));
                }
            }
            Step::Revoke(ids) => {
                let gone = self.rules.rules.iter().filter(|rule| ids.contains(&rule.id));
                let gone: Vec<String> = gone
                    .map(|rule| format!("-{}-{}", rule.permission.from_port, rule.permission.to_port))
                    .collect();
                self.changes.extend(gone);
                self.rules.rules.retain(|rule| !ids.contains(&rule.id));
            }
            Step::Done => {}
        }
        Answer::Done
    }

    fn settle(&mut self, claims: &[Claim], overflow: RuleOverflow) -> State {
        self.settle_knowing(claims, overflow, &mut Known::default())
    }

    fn settle_knowing(&mut self, claims: &[Claim], overflow: RuleOverflow, known: &mut Known) -> State {
        let ours = marker("c", None);
        let wish = Wish { group: "sg-n", claims, marker: &ours, adopt: false, overflow };
        let mut pass = Pass::default();
        loop {
            let step = pass.next(&wish, known);
            if step == Step::Done {
                return pass.state(&wish, known);
            }
            let answer = self.answer(&step, &ours);
            pass.answered(&wish, known, &step, answer);
        }
    }
}

const ANY_ROOM: usize = 60;

fn changes(rules: &[(&str, Permission, &str)], claims: &[Claim]) -> Vec<String> {
    let mut group = Group::new(ANY_ROOM, rules);
    group.settle(claims, RuleOverflow::Fail);
    group.changes
}

#[test]
fn ports_of_several_bindings_are_joined_only_where_no_port_lies_between() {
    let asked = [rule(80, 80, "sg-a"), rule(81, 90, "sg-a"), rule(92, 92, "sg-a"), rule(80, 80, "sg-b")];
    let expected = BTreeSet::from([rule(80, 90, "sg-a"), rule(92, 92, "sg-a"), rule(80, 80, "sg-b")]);
    assert_eq!(union(&asked), expected);
    let whole = [rule(0, 65535, "sg-a"), rule(65535, 65535, "sg-a")];
    assert_eq!(union(&whole), BTreeSet::from([rule(0, 65535, "sg-a")]));
}

#[test]
fn what_is_missing_is_added_before_what_is_stale_goes() {
    let ours = marker("c", None);
    let rules = [("sgr-1", rule(80, 80, "sg-a"), ours.as_str()), ("sgr-2", rule(90, 90, "sg-a"), &ours)];
    let claims = [claim(&[rule(80, 80, "sg-a"), rule(85, 85, "sg-a")])];
    assert_eq!(changes(&rules, &claims), ["+85-85", "-90-90"]);
}

#[test]
fn what_is_taken_away_was_read_afresh() {
    let ours = marker("c", None);
    let claims = [claim(&[rule(80, 80, "sg-a")])];
    let wish =
        Wish { group: "sg-n", claims: &claims, marker: &ours, adopt: false, overflow: RuleOverflow::Fail };
    let (mut pass, mut known) = (Pass::default(), Known::default());
    let mut group = Group::new(ANY_ROOM, &[("sgr-1", rule(90, 90, "sg-a"), &ours)]);
    let mut steps = Vec::new();
    loop {
        let step = pass.next(&wish, &mut known);
        steps.push(step.clone());
        if step == Step::Done {
            break;
        }
        let answer = group.answer(&step, &ours);
        pass.answered(&wish, &mut known, &step, answer);
    }
    let add = Step::Authorize(vec![rule(80, 80, "sg-a")]);
    let revoke = Step::Revoke(vec!["sgr-1".to_owned()]);
    assert_eq!(steps, [Step::Read, add, Step::Confirm, revoke, Step::Done]);
}

#[test]
fn rules_of_others_count_as_present_and_are_never_taken_away() {
    let rules = [("sgr-1", rule(80, 80, "sg-a"), "by hand"), ("sgr-2", rule(90, 90, "sg-a"), "by hand")];
    let mut group = Group::new(ANY_ROOM, &rules);
    let state = group.settle(&[claim(&[rule(80, 80, "sg-a")])], RuleOverflow::Fail);
    assert!(group.changes.is_empty() && state.leans_on_others);
    let other = marker("other", None);
    assert!(changes(&[("sgr-1", rule(80, 80, "sg-a"), &other)], &[]).is_empty());
    let other = marker("c", Some("other"));
    assert!(changes(&[("sgr-1", rule(80, 80, "sg-a"), &other)], &[]).is_empty());
    assert!(changes(&[("sgr-1", rule(80, 80, "sg-a"), names::RULE_DESCRIPTION)], &[]).is_empty());
}

#[test]
fn rules_of_lbc_are_ours_when_they_are_adopted() {
    let claims = [claim(&[rule(80, 80, "sg-a")])];
    let ours = marker("c", None);
    let wish =
        Wish { group: "sg-n", claims: &claims, marker: &ours, adopt: true, overflow: RuleOverflow::Fail };
    let lbc = names::RULE_DESCRIPTION;
    let mut group = Group::new(
        ANY_ROOM,
        &[
            ("sgr-1", rule(80, 80, "sg-a"), lbc),
            ("sgr-2", rule(90, 90, "sg-a"), lbc),
            ("sgr-3", rule(91, 91, "sg-a"), "elbv2.k8s.aws/targetGroupBinding=shared,x"),
        ],
    );
    let (mut pass, mut known) = (Pass::default(), Known::default());
    loop {
        let step = pass.next(&wish, &mut known);
        if step == Step::Done {
            break;
        }
        let answer = group.answer(&step, &ours);
        pass.answered(&wish, &mut known, &step, answer);
    }
    assert_eq!(group.changes, ["-90-90"]);
}

#[test]
fn a_binding_that_is_not_known_keeps_what_its_spec_could_ask_for_and_holds_up_nothing_else() {
    let ours = marker("c", None);
    let rules = [("sgr-1", rule(90, 90, "sg-a"), ours.as_str()), ("sgr-2", rule(90, 90, "sg-b"), &ours)];
    assert_eq!(changes(&rules, &[claim(&[]), keeping(&[rule(0, 65535, "sg-b")])]), ["-90-90"]);
    assert!(changes(&rules, &[keeping(&[rule(90, 95, "sg-a"), rule(90, 90, "sg-b")])]).is_empty());
}

#[test]
fn retained_rules_get_another_description_and_stay_whoever_goes_or_comes() {
    let ours = marker("c", None);
    let mut group = Group::new(
        ANY_ROOM,
        &[
            ("sgr-1", rule(80, 80, "sg-a"), &ours),
            ("sgr-2", rule(90, 90, "sg-a"), &ours),
            ("sgr-3", rule(80, 80, "sg-b"), "by hand"),
        ],
    );
    let mut known = Known::default();
    let going = retained(&[rule(80, 80, "sg-a"), rule(80, 80, "sg-b"), rule(81, 81, "sg-a")]);
    let state = group.settle_knowing(&[going], RuleOverflow::Fail, &mut known);
    assert_eq!(group.changes, ["=80-80", "-90-90"], "nothing is added, and rules of others are left alone");
    assert_eq!((state.unretained, state.ours), (None, Some(BTreeSet::new())));
    // The binding is gone; another one wants the same rule, which counts as there, and goes again.
    group.settle_knowing(&[], RuleOverflow::Fail, &mut known);
    let state = group.settle_knowing(&[claim(&[rule(80, 80, "sg-a")])], RuleOverflow::Fail, &mut known);
    assert!(state.rules.contains(&rule(80, 80, "sg-a")) && state.failed.is_empty());
    group.settle(&[], RuleOverflow::Fail);
    assert_eq!(group.changes.len(), 2, "{:?}", group.changes);
}

#[test]
fn what_cannot_be_retained_is_told_and_is_not_taken_away_either() {
    let ours = marker("c", None);
    let rules = there(&[("sgr-1", rule(80, 80, "sg-a"), &ours)]);
    let claims = [retained(&[rule(80, 80, "sg-a")])];
    let wish =
        Wish { group: "sg-n", claims: &claims, marker: &ours, adopt: false, overflow: RuleOverflow::Fail };
    let (mut pass, mut known) = (Pass::default(), Known::default());
    loop {
        let step = pass.next(&wish, &mut known);
        let answer = match &step {
            Step::Done => break,
            Step::Read | Step::Confirm => Answer::Rules(rules.clone()),
            Step::Retain(_) => Answer::Failed(error("UnauthorizedOperation")),
            step => panic!("{step:?}"),
        };
        pass.answered(&wish, &mut known, &step, answer);
    }
    let state = pass.state(&wish, &mut known);
    assert_eq!(state.unretained.unwrap().0, BTreeSet::from([rule(80, 80, "sg-a")]));
}

#[test]
fn what_is_remembered_of_a_group_saves_the_reading_but_nothing_is_taken_away_on_its_word() {
    let ours = marker("c", None);
    let mut group = Group::new(ANY_ROOM, &[("sgr-1", rule(80, 80, "sg-a"), &ours)]);
    let mut known = Known::default();
    let steps = |group: &mut Group, known: &mut Known, claims: &[Claim]| -> Vec<Step> {
        let wish = Wish { group: "sg-n", claims, marker: &ours, adopt: false, overflow: RuleOverflow::Fail };
        let (mut pass, mut steps) = (Pass::remembering(known), Vec::new());
        loop {
            let step = pass.next(&wish, known);
            steps.push(step.clone());
            if step == Step::Done {
                pass.state(&wish, known);
                return steps;
            }
            let answer = group.answer(&step, &ours);
            pass.answered(&wish, known, &step, answer);
        }
    };
    let both = [claim(&[rule(80, 80, "sg-a"), rule(443, 443, "sg-a")])];
    let add = Step::Authorize(vec![rule(443, 443, "sg-a")]);
    assert_eq!(steps(&mut group, &mut known, &both), [Step::Read, add, Step::Done]);
    assert_eq!(steps(&mut group, &mut known, &both), [Step::Done]);
    // The id of the rule that was added is not known yet.
    let found = steps(&mut group, &mut known, &[claim(&[rule(80, 80, "sg-a")])]);
    assert!(
        matches!(&found[..], [Step::Confirm, Step::Revoke(ids), Step::Done] if ids.len() == 1),
        "{found:?}"
    );
}

#[test]
fn a_binding_without_endpoints_keeps_the_rules_that_it_had() {
    let ours = marker("c", None);
    let rules = [("sgr-1", rule(80, 90, "sg-a"), ours.as_str()), ("sgr-2", rule(95, 95, "sg-a"), &ours)];
    let claims = [keeping(&[rule(85, 85, "sg-a")])];
    assert_eq!(changes(&rules, &claims), ["-95-95"]);
}

#[test]
fn a_bad_source_fails_alone_and_keeps_nothing_from_its_place() {
    let ours = marker("c", None);
    let mut group = Group::new(ANY_ROOM, &[("sgr-1", rule(90, 90, "sg-a"), &ours)]);
    let bad = rule(80, 80, "sg-bad");
    let claims = [claim(&[rule(80, 80, "sg-a"), bad.clone()]), claim(&[rule(81, 81, "10.0.0.0/8")])];
    let mut known = Known::default();
    let state = group.settle_knowing(&claims, RuleOverflow::Fail, &mut known);
    assert_eq!(state.failed.keys().collect::<Vec<_>>(), [&bad]);
    let mut done = group.changes.clone();
    done.sort();
    assert_eq!(done, ["+80-80", "+81-81", "-90-90"]);
    // The next time the good ones go together again, and the bad one by itself.
    let claims = [claim(&[rule(80, 80, "sg-a"), bad, rule(70, 70, "sg-a"), rule(75, 75, "sg-a")])];
    let wish =
        Wish { group: "sg-n", claims: &claims, marker: &ours, adopt: false, overflow: RuleOverflow::Fail };
    let mut pass = Pass::default();
    let answer = group.answer(&Step::Read, &ours);
    pass.answered(&wish, &mut known, &Step::Read, answer);
    let both = Step::Authorize(vec![rule(70, 70, "sg-a"), rule(75, 75, "sg-a")]);
    assert_eq!(pass.next(&wish, &mut known), both);
}

#[test]
fn in_a_full_group_the_newest_binding_has_no_room_and_nobody_loses_a_rule() {
    let ours = marker("c", None);
    let rules = [("sgr-1", rule(80, 80, "sg-a"), ours.as_str()), ("sgr-2", rule(90, 90, "sg-a"), &ours)];
    let mut group = Group::new(3, &rules);
    let claims = [
        claim(&[rule(80, 80, "sg-a")]),
        claim(&[rule(90, 90, "sg-a")]),
        claim(&[rule(70, 70, "sg-a")]),
        claim(&[rule(60, 60, "sg-a")]),
    ];
    let state = group.settle(&claims, RuleOverflow::Fail);
    assert_eq!(group.changes, ["+70-70"]);
    assert_eq!(state.failed.keys().collect::<Vec<_>>(), [&rule(60, 60, "sg-a")]);
    assert!(state.failed.values().all(|error| error.code == FULL));
}

#[test]
fn in_a_full_group_a_stale_rule_becomes_a_wanted_one() {
    let ours = marker("c", None);
    let rules = [("sgr-1", rule(80, 80, "sg-a"), ours.as_str()), ("sgr-2", rule(90, 90, "sg-a"), &ours)];
    let mut group = Group::new(2, &rules);
    group.settle(&[claim(&[rule(80, 80, "sg-a"), rule(70, 70, "sg-a")])], RuleOverflow::Fail);
    assert_eq!(group.changes, ["90-90>70-70"]);
}

#[test]
fn in_a_full_group_a_rule_in_use_grows_and_is_never_turned_into_a_stranger() {
    let ours = marker("c", None);
    let rules = [("sgr-1", rule(80, 80, "sg-a"), ours.as_str()), ("sgr-2", rule(90, 90, "sg-b"), &ours)];
    let mut group = Group::new(2, &rules);
    // 80 and 81 are one rule now, so that 80's is no longer wanted as it stands; 443 comes first by age.
    let claims = [
        claim(&[rule(443, 443, "sg-a")]),
        claim(&[rule(80, 80, "sg-a")]),
        claim(&[rule(81, 81, "sg-a")]),
        claim(&[rule(90, 90, "sg-b")]),
    ];
    let state = group.settle(&claims, RuleOverflow::Fail);
    assert_eq!(group.changes, ["80-80>80-81"]);
    assert_eq!(state.failed.keys().collect::<Vec<_>>(), [&rule(443, 443, "sg-a")]);
}

#[test]
fn in_a_full_group_exactly_as_many_stale_rules_of_another_kind_go_first_as_are_needed() {
    let ours = marker("c", None);
    let rules = [
        ("sgr-1", rule(80, 80, "10.0.0.0/8"), ours.as_str()),
        ("sgr-2", rule(81, 81, "10.0.0.0/8"), &ours),
        ("sgr-3", rule(82, 82, "10.0.0.0/8"), &ours),
    ];
    let mut group = Group::new(3, &rules);
    group.settle(&[claim(&[rule(443, 443, "sg-a")])], RuleOverflow::Fail);
    let adds = group.changes.iter().position(|change| change == "+443-443").unwrap();
    assert_eq!(adds, 1, "{:?}", group.changes);
    assert_eq!(group.rules.rules.len(), 1);
}

#[test]
fn a_full_group_is_widened_where_the_gap_is_smallest_and_stays_so() {
    let ours = marker("c", None);
    let ports = [80, 90, 92, 200];
    let claims: Vec<Claim> = ports.iter().map(|port| claim(&[rule(*port, *port, "sg-a")])).collect();
    let mut group = Group::new(3, &[("sgr-0", rule(22, 22, "10.0.0.0/8"), "by hand")]);
    let mut known = Known::default();
    let state = group.settle_knowing(&claims, RuleOverflow::Widen, &mut known);
    assert!(state.failed.is_empty(), "{state:?}");
    let open: Vec<(u16, u16)> = group
        .rules
        .rules
        .iter()
        .filter(|rule| rule.description == ours)
        .map(|rule| (rule.permission.from_port, rule.permission.to_port))
        .collect();
    assert_eq!(open.len(), 2);
    for port in ports {
        assert!(open.iter().any(|(from, to)| *from <= port && *to >= port), "{open:?}");
    }
    assert_eq!(state.widened, [rule(80, 92, "sg-a")]);
    // Neither the next pass nor one after a restart changes anything.
    let before = group.changes.len();
    group.settle_knowing(&claims, RuleOverflow::Widen, &mut known);
    group.settle(&claims, RuleOverflow::Widen);
    assert_eq!(group.changes.len(), before, "{:?}", group.changes);
    // With room again, it is exact again.
    group.room = ANY_ROOM;
    known.forget_quota();
    let state = group.settle_knowing(&claims, RuleOverflow::Widen, &mut known);
    assert!(state.widened.is_empty());
    assert_eq!(group.rules.rules.iter().filter(|rule| rule.description == ours).count(), ports.len());
}

#[test]
fn a_rule_that_was_taken_away_does_not_count_as_there_because_a_reading_lags_behind() {
    let ours = marker("c", None);
    let mut group = Group::new(ANY_ROOM, &[("sgr-1", rule(80, 80, "sg-a"), &ours)]);
    let old = group.rules.clone();
    let mut known = Known::default();
    group.settle_knowing(&[claim(&[])], RuleOverflow::Fail, &mut known);
    let claims = [claim(&[rule(80, 80, "sg-a")])];
    let wish =
        Wish { group: "sg-n", claims: &claims, marker: &ours, adopt: false, overflow: RuleOverflow::Fail };
    let mut pass = Pass::default();
    pass.answered(&wish, &mut known, &Step::Read, Answer::Rules(old));
    assert_eq!(pass.next(&wish, &mut known), Step::Authorize(vec![rule(80, 80, "sg-a")]));
}

#[test]
fn without_the_permission_to_add_what_nobody_wants_still_goes() {
    let ours = marker("c", None);
    let claims = [claim(&[rule(80, 80, "sg-a")])];
    let wish =
        Wish { group: "sg-n", claims: &claims, marker: &ours, adopt: false, overflow: RuleOverflow::Fail };
    let (mut pass, mut known) = (Pass::default(), Known::default());
    let rules = there(&[("sgr-1", rule(90, 90, "sg-a"), &ours)]);
    pass.answered(&wish, &mut known, &Step::Read, Answer::Rules(rules.clone()));
    let step = pass.next(&wish, &mut known);
    pass.answered(&wish, &mut known, &step, Answer::Failed(error("UnauthorizedOperation")));
    assert_eq!(pass.next(&wish, &mut known), Step::Confirm);
    pass.answered(&wish, &mut known, &Step::Confirm, Answer::Rules(rules));
    assert_eq!(pass.next(&wish, &mut known), Step::Revoke(vec!["sgr-1".to_owned()]));
}
