//! One security group: which rules all claims together want of it, and the steps that bring it there. Pure: whoever
//! drives a [`Pass`] makes the calls and hands back the answers ([`crate::security`], and the model in the tests).
//!
//! Three laws keep this safe: rules are added before any is taken away; one that is taken away was read afresh, is ours, and
//! opens nothing to a living binding that no other rule opens. A binding of which little is known claims all that its spec
//! could ask for ([`Claim::keep`]).

use crate::network::{Claim, is_retained};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use tgb_api::names;
use tgb_aws::values::{Permission, Rule, RuleProtocol, SecurityGroupRules, Source};
use tgb_aws::{AwsError, Class};

/// `--rule-overflow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RuleOverflow {
    /// Rules without room are reported; they are those of the newest bindings.
    Fail,
    /// The closest ranges are merged, which opens ports in between.
    Widen,
}

/// The wishes about a group.
#[derive(Debug, Clone)]
pub(crate) struct Wish<'a> {
    /// `sg-…`
    pub(crate) group: &'a str,
    /// The claims as far as they concern this group, that of the oldest binding first.
    pub(crate) claims: &'a [Claim],
    /// The description of our rules.
    pub(crate) marker: &'a str,
    /// Rules with LBC's description are ours, too.
    pub(crate) adopt: bool,
    pub(crate) overflow: RuleOverflow,
}

impl Wish<'_> {
    fn is_ours(&self, rule: &Rule) -> bool {
        rule.description == self.marker || (self.adopt && rule.description == names::RULE_DESCRIPTION)
    }
}

/// A call to make for a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Read the rules.
    Read,
    /// Read the rules, and whose wishes there are, since something is to be taken away next.
    Confirm,
    /// Add these, all or none.
    Authorize(Vec<Permission>),
    /// Turn a rule of ours into another.
    Modify(String, Permission),
    /// Give rules of ours another description, so that they stay for good, all or none.
    Retain(Vec<Retained>),
    /// Take these rules away, all or none.
    Revoke(Vec<String>),
    /// Nothing is left to do.
    Done,
}

/// A rule that stays for good, and its new description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Retained {
    pub(crate) id: String,
    pub(crate) permission: Permission,
    pub(crate) description: String,
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// To [`Step::Read`] and [`Step::Confirm`].
    Rules(SecurityGroupRules),
    /// To the others.
    Done,
    /// To any.
    Failed(AwsError),
}

/// The state of a group at the end of a pass.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct State {
    /// The rules that are there, whoever's they are.
    pub(crate) rules: BTreeSet<Permission>,
    /// Rules that could not be added, and why.
    pub(crate) failed: BTreeMap<Permission, AwsError>,
    /// Ranges that open more than was asked for.
    pub(crate) widened: Vec<Permission>,
    /// The error that broke the pass off, or that kept rules which nobody wants any more.
    pub(crate) error: Option<AwsError>,
    /// A wanted rule is somebody else's, who may take it away.
    pub(crate) leans_on_others: bool,
    /// Rules of ours, wanted or not; `None` if the group could not be read.
    pub(crate) ours: Option<BTreeSet<Permission>>,
    /// Rules of ours that nobody wants and that are still there.
    pub(crate) stale: BTreeSet<Permission>,
    /// Rules that were to be retained and could not be described so, and why.
    pub(crate) unretained: Option<(BTreeSet<Permission>, AwsError)>,
    /// The numbers of rules that would be added and taken away, where nothing may be written.
    pub(crate) withheld: Option<(usize, usize)>,
}

/// The memory of a group from pass to pass; losing it costs calls, no rule.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// The numbers of IPv4 and IPv6 rules that fit, once AWS has refused another one.
    quota: [Option<usize>; 2],
    /// Rules that we took away or changed (to what, with which description), and those that were ever seen to be retained:
    /// readings may lag behind.
    written: VecDeque<(String, Option<(Permission, String)>)>,
    /// Refused when tried alone; they are kept apart from good ones.
    suspects: BTreeSet<Permission>,
    /// The rules as they were at the end of the last pass. Additions need no fresh reading, only what is taken away does.
    there: Option<SecurityGroupRules>,
    /// Rules that could not be added then, want of room apart: they are tried again with the next reading.
    failed: BTreeMap<Permission, AwsError>,
}

impl Known {
    /// Quotas can be raised, so one that was met is tried again from time to time.
    pub(crate) fn forget_quota(&mut self) {
        self.quota = [None, None];
    }

    fn wrote(&mut self, id: &str, to: Option<(Permission, String)>) {
        const MOST: usize = 256;
        self.written.retain(|(known, _)| known != id);
        self.written.push_back((id.to_owned(), to));
        if self.written.len() > MOST {
            self.written.pop_front();
        }
    }

    /// A reading, corrected by what we know better.
    fn corrected(&mut self, mut read: SecurityGroupRules) -> SecurityGroupRules {
        let shown: BTreeMap<&str, (&Permission, &str)> = read
            .rules
            .iter()
            .map(|rule| (rule.id.as_str(), (&rule.permission, rule.description.as_str())))
            .collect();
        for rule in read.rules.iter().filter(|rule| is_retained(&rule.description)) {
            self.wrote(&rule.id, Some((rule.permission.clone(), rule.description.clone())));
        }
        self.written.retain(|(id, to)| {
            if to.as_ref().is_some_and(|(_, description)| is_retained(description)) {
                return true;
            }
            let expected = to.as_ref().map(|(permission, description)| (permission, description.as_str()));
            expected.is_none() || expected != shown.get(id.as_str()).copied()
        });
        for (id, to) in &self.written {
            match to {
                None => read.rules.retain(|rule| rule.id != *id),
                Some((permission, description)) => {
                    for rule in read.rules.iter_mut().filter(|rule| rule.id == *id) {
                        rule.permission.clone_from(permission);
                        rule.description.clone_from(description);
                    }
                }
            }
        }
        read
    }
}

/// One pass over a group. Ask [`Self::next`], do it, tell [`Self::answered`], until [`Step::Done`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Pass {
    /// The rules as read, plus what was acknowledged since.
    there: Option<SecurityGroupRules>,
    /// Nothing was written since the last [`Step::Confirm`].
    confirmed: bool,
    /// A call with several was refused, so that they go one by one.
    one_by_one: bool,
    revokes_one_by_one: bool,
    retains_one_by_one: bool,
    /// Rules whose description could not be changed, by id.
    unretained: BTreeMap<String, AwsError>,
    /// Rules that AWS does not turn into others.
    unchangeable: BTreeSet<String>,
    failed: BTreeMap<Permission, AwsError>,
    stuck: Option<AwsError>,
    error: Option<AwsError>,
    calls: usize,
}

const FULL: &str = "RulesPerSecurityGroupLimitExceeded";
const DUPLICATE: &str = "InvalidPermission.Duplicate";
const NO_SUCH_RULE: &str = "InvalidSecurityGroupRuleId.NotFound";
/// A pass that takes more calls goes round in circles.
const MOST_CALLS: usize = 2000;

impl Pass {
    /// A pass that goes on from what the last one has left, without reading.
    pub(crate) fn remembering(known: &Known) -> Self {
        Self { there: known.there.clone(), failed: known.failed.clone(), ..Self::default() }
    }

    /// The next step.
    pub(crate) fn next(&mut self, wish: &Wish<'_>, known: &mut Known) -> Step {
        self.calls += 1;
        if self.error.is_some() || self.calls > MOST_CALLS {
            return Step::Done;
        }
        let Some(there) = self.there.clone() else { return Step::Read };
        let view = View::new(wish, &there, known);
        let (wanted, _) = view.wanted(known);
        let retain = view.to_retain(&self.unretained);
        if !retain.is_empty() {
            return self.retain(retain);
        }
        if let Some(step) = self.grow(&view, &wanted, known) {
            return step;
        }
        if self.stuck.is_some() {
            return Step::Done;
        }
        let mut stale = ids(view.stale(&wanted));
        match (stale.is_empty(), self.confirmed) {
            // Rules that were just added can be taken away only by the ids that a reading shows.
            (true, false) if view.has_unnumbered(|permission| !wanted.contains(permission)) => Step::Confirm,
            (true, _) => Step::Done,
            (false, false) => Step::Confirm,
            (false, true) => {
                if self.revokes_one_by_one {
                    stale.truncate(1);
                }
                Step::Revoke(stale)
            }
        }
    }

    /// Has rules of ours described as retained. They are read afresh first, since a change of the description names the
    /// ports and the source, too.
    fn retain(&self, mut rules: Vec<Retained>) -> Step {
        if !self.confirmed {
            return Step::Confirm;
        }
        if self.retains_one_by_one {
            rules.truncate(1);
        }
        Step::Retain(rules)
    }

    /// Takes in what a step has answered.
    pub(crate) fn answered(&mut self, wish: &Wish<'_>, known: &mut Known, step: &Step, answer: Answer) {
        let error = match answer {
            Answer::Rules(read) => {
                self.there = Some(known.corrected(read));
                self.confirmed = *step == Step::Confirm;
                return;
            }
            Answer::Done => None,
            Answer::Failed(error) => Some(error),
        };
        // Whether it was done is not known, or will not be for now: the next pass reads.
        if let Some(error) = error.as_ref().filter(|error| error.class() != Class::Terminal) {
            self.error = Some(error.clone());
            return;
        }
        let there = self.there.get_or_insert_default();
        match (step, error) {
            (Step::Read | Step::Confirm, Some(error)) => self.error = Some(error),
            (Step::Read | Step::Confirm | Step::Done, _) => {}
            (Step::Authorize(added), None) => {
                let rule = |permission: &Permission| unnumbered(permission, wish.marker);
                there.rules.extend(added.iter().map(rule));
                known.suspects.retain(|suspect| !added.contains(suspect));
                self.confirmed = false;
            }
            (Step::Authorize(added), Some(error)) => self.refused(wish, known, added, error),
            (Step::Modify(id, to), None) => {
                for rule in there.rules.iter_mut().filter(|rule| rule.id == *id) {
                    rule.permission = to.clone();
                    wish.marker.clone_into(&mut rule.description);
                }
                known.wrote(id, Some((to.clone(), wish.marker.to_owned())));
                self.confirmed = false;
            }
            (Step::Modify(id, _), Some(error)) if error.code == NO_SUCH_RULE => {
                there.rules.retain(|rule| rule.id != *id);
            }
            (Step::Retain(retained), None) => {
                for Retained { id, permission, description } in retained {
                    for rule in there.rules.iter_mut().filter(|rule| rule.id == *id) {
                        rule.description.clone_from(description);
                    }
                    known.wrote(id, Some((permission.clone(), description.clone())));
                }
                self.confirmed = false;
            }
            (Step::Retain(retained), Some(error)) if retained.len() > 1 && !error.is_access_denied() => {
                self.retains_one_by_one = true;
            }
            (Step::Retain(retained), Some(error)) if error.code == NO_SUCH_RULE => {
                there.rules.retain(|rule| retained.iter().all(|other| other.id != rule.id));
                retained.iter().for_each(|rule| known.wrote(&rule.id, None));
            }
            (Step::Retain(retained), Some(error)) => {
                self.unretained.extend(retained.iter().map(|rule| (rule.id.clone(), error.clone())));
            }
            (Step::Modify(_, to), Some(error)) if error.code == DUPLICATE => {
                there.rules.push(unnumbered(to, ""));
            }
            (Step::Modify(id, _), Some(_)) => drop(self.unchangeable.insert(id.clone())),
            (Step::Revoke(ids), Some(error)) if error.code == NO_SUCH_RULE && ids.len() > 1 => {
                self.revokes_one_by_one = true;
            }
            (Step::Revoke(_), Some(error)) if error.code != NO_SUCH_RULE => self.stuck = Some(error),
            (Step::Revoke(ids), _) => {
                there.rules.retain(|rule| !ids.contains(&rule.id));
                for id in ids {
                    known.wrote(id, None);
                }
            }
        }
    }

    /// The state of the group at the end.
    pub(crate) fn state(&self, wish: &Wish<'_>, known: &mut Known) -> State {
        let empty = SecurityGroupRules::default();
        let there = self.there.as_ref().unwrap_or(&empty);
        known.there = self.there.clone().filter(|_| self.error.is_none());
        known.failed = self.failed.clone();
        known.failed.retain(|_, error| error.code != FULL);
        let view = View::new(wish, there, known);
        let (wanted, widened) = view.wanted(known);
        let is_theirs = |permission: &Permission| {
            let mut holders = there.rules.iter().filter(|rule| rule.permission == *permission);
            holders.any(|rule| !wish.is_ours(rule))
        };
        let circles = (self.calls > MOST_CALLS).then(|| AwsError {
            operation: "DescribeSecurityGroupRules",
            code: "InternalError".to_owned(),
            message: "the security group does not settle; another controller may write it, too".to_owned(),
        });
        State {
            rules: there.rules.iter().map(|rule| rule.permission.clone()).collect(),
            failed: self.failed.clone(),
            widened,
            error: self.error.clone().or_else(|| self.stuck.clone()).or(circles),
            leans_on_others: wanted.iter().any(is_theirs),
            ours: self.there.as_ref().map(|there| {
                let ours = there.rules.iter().filter(|rule| wish.is_ours(rule));
                ours.map(|rule| rule.permission.clone()).collect()
            }),
            stale: view.stale(&wanted).into_iter().map(|rule| rule.permission.clone()).collect(),
            unretained: self.unretained.values().next().map(|error| {
                let rules = there.rules.iter().filter(|rule| self.unretained.contains_key(&rule.id));
                (rules.map(|rule| rule.permission.clone()).collect(), error.clone())
            }),
            withheld: None,
        }
    }

    /// The numbers of rules that this pass would add and take away if it went on from its reading.
    pub(crate) fn outlook(&self, wish: &Wish<'_>, known: &mut Known) -> (usize, usize) {
        let Some(there) = &self.there else { return (0, 0) };
        let view = View::new(wish, there, known);
        let (wanted, _) = view.wanted(known);
        let missing = wanted.iter().filter(|permission| !view.present.contains(permission)).count();
        let mut after = there.clone();
        after.rules.extend(wanted.iter().map(|permission| unnumbered(permission, wish.marker)));
        (missing, View::new(wish, &after, known).stale(&wanted).len())
    }

    /// The next addition, if one is missing.
    fn grow(&mut self, view: &View<'_>, wanted: &[Permission], known: &Known) -> Option<Step> {
        let missing: Vec<&Permission> = wanted
            .iter()
            .filter(|permission| !view.present.contains(permission) && !self.failed.contains_key(permission))
            .collect();
        let mut counts = view.counts;
        let (mut fit, mut tight) = (Vec::new(), Vec::new());
        for permission in missing {
            match has_room(counts, known, &permission.source) {
                true => {
                    counted(&mut counts, &permission.source);
                    fit.push(permission.clone());
                }
                false => tight.push(permission.clone()),
            }
        }
        if !fit.is_empty() {
            let (doubtful, mut good): (Vec<_>, Vec<_>) =
                fit.into_iter().partition(|permission| known.suspects.contains(permission));
            if good.is_empty() {
                good = doubtful;
                good.truncate(1);
            } else if self.one_by_one {
                good.truncate(1);
            }
            return Some(Step::Authorize(good));
        }
        // Rules that were just added can be changed only by the ids that a reading shows.
        if !tight.is_empty() && !self.confirmed && view.has_unnumbered(|_| true) {
            return Some(Step::Confirm);
        }
        for permission in tight {
            match view.room_for(&permission, wanted, &self.unchangeable) {
                Some(room) if room.loses_nothing || self.confirmed => return Some(room.step),
                Some(_) => return Some(Step::Confirm),
                None => {
                    let error = AwsError {
                        operation: "AuthorizeSecurityGroupIngress",
                        code: FULL.to_owned(),
                        message: "The maximum number of rules per security group has been reached."
                            .to_owned(),
                    };
                    self.failed.insert(permission, error);
                }
            }
        }
        None
    }

    /// AuthorizeSecurityGroupIngress was refused.
    fn refused(&mut self, wish: &Wish<'_>, known: &mut Known, added: &[Permission], error: AwsError) {
        let Some(there) = &mut self.there else { return };
        if error.code == "InvalidGroup.NotFound" && error.message.contains(wish.group) {
            self.error = Some(error);
            return;
        }
        if error.is_access_denied() {
            self.failed.extend(added.iter().map(|permission| (permission.clone(), error.clone())));
            return;
        }
        let [only] = added else {
            self.one_by_one = true;
            return;
        };
        match error.code.as_str() {
            // A reading that lags behind, or somebody was faster.
            DUPLICATE => there.rules.push(unnumbered(only, "")),
            FULL => {
                let [v4, v6] = View::new(wish, there, known).counts;
                let [quota4, quota6] = &mut known.quota;
                let [in4, in6] = families(&only.source);
                if in4 && (!in6 || v4 >= v6) {
                    *quota4 = Some(v4);
                }
                if in6 && (!in4 || v6 >= v4) {
                    *quota6 = Some(v6);
                }
            }
            _ => {
                known.suspects.insert(only.clone());
                self.failed.insert(only.clone(), error);
            }
        }
    }
}

/// A rule whose id no answer has told, so that it cannot be taken away before the next reading.
fn unnumbered(permission: &Permission, description: &str) -> Rule {
    Rule { id: String::new(), permission: permission.clone(), description: description.to_owned() }
}

/// The fewest ranges that open exactly what is asked for.
pub(crate) fn union<'a>(asked: impl IntoIterator<Item = &'a Permission>) -> BTreeSet<Permission> {
    let mut by_source: BTreeMap<(RuleProtocol, &Source), Vec<(u16, u16)>> = BTreeMap::new();
    for permission in asked {
        let ranges = by_source.entry((permission.protocol, &permission.source)).or_default();
        ranges.push((permission.from_port, permission.to_port));
    }
    let mut found = BTreeSet::new();
    for ((protocol, source), ranges) in by_source {
        found.extend(joined(ranges).into_iter().map(|(from_port, to_port)| Permission {
            protocol,
            from_port,
            to_port,
            source: source.clone(),
        }));
    }
    found
}

/// Tells if everything that `asked` opens is opened by `there`, by one rule or by several side by side.
pub(crate) fn is_open<'a>(asked: &Permission, there: impl IntoIterator<Item = &'a Permission>) -> bool {
    let ranges = there.into_iter().filter(|rule| is_akin(rule, asked));
    let ranges = joined(ranges.map(|rule| (rule.from_port, rule.to_port)).collect());
    ranges.iter().any(|(from, to)| *from <= asked.from_port && *to >= asked.to_port)
}

/// Tells if two sets of rules open something in common.
pub(crate) fn overlap<'a, 'b>(
    ones: impl IntoIterator<Item = &'a Permission>,
    others: impl IntoIterator<Item = &'b Permission> + Clone,
) -> bool {
    ones.into_iter().any(|one| others.clone().into_iter().any(|other| common(one, other).is_some()))
}

// ---- details ----

fn ids(rules: Vec<&Rule>) -> Vec<String> {
    rules.into_iter().map(|rule| rule.id.clone()).collect()
}

/// Ranges sorted, and those that touch or overlap made one.
fn joined(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut found: Vec<(u16, u16)> = Vec::new();
    for (from, to) in ranges {
        match found.last_mut() {
            Some((_, end)) if u32::from(from) <= u32::from(*end) + 1 => *end = (*end).max(to),
            _ => found.push((from, to)),
        }
    }
    found
}

fn is_akin(one: &Permission, other: &Permission) -> bool {
    one.protocol == other.protocol && one.source == other.source
}

fn is_within(inner: &Permission, outer: &Permission) -> bool {
    is_akin(inner, outer) && outer.from_port <= inner.from_port && inner.to_port <= outer.to_port
}

fn common(one: &Permission, other: &Permission) -> Option<Permission> {
    let (from_port, to_port) = (one.from_port.max(other.from_port), one.to_port.min(other.to_port));
    (is_akin(one, other) && from_port <= to_port).then(|| Permission { from_port, to_port, ..one.clone() })
}

/// The quotas, of IPv4 rules and of IPv6 rules, that a source counts against. A security group counts against both.
fn families(source: &Source) -> [bool; 2] {
    match source {
        Source::SecurityGroup(_) => [true, true],
        Source::Cidr(cidr) if cidr.contains(':') => [false, true],
        Source::Cidr(_) => [true, false],
    }
}

fn counted(counts: &mut [usize; 2], source: &Source) {
    for (count, is_in) in counts.iter_mut().zip(families(source)) {
        *count += usize::from(is_in);
    }
}

fn has_room(counts: [usize; 2], known: &Known, source: &Source) -> bool {
    let full = |(count, quota): (usize, Option<usize>)| quota.is_some_and(|quota| count >= quota);
    let mut families = counts.into_iter().zip(known.quota).zip(families(source));
    !families.any(|(family, is_in)| is_in && full(family))
}

/// A way to make room in a full group.
struct Room {
    step: Step,
    /// Safe whatever others want.
    loses_nothing: bool,
}

/// A group beside what is wanted of it.
struct View<'a> {
    wish: &'a Wish<'a>,
    there: &'a SecurityGroupRules,
    present: BTreeSet<&'a Permission>,
    /// Rules that count as IPv4 and as IPv6.
    counts: [usize; 2],
    /// The rules that living bindings may use: what they ask for here, and what they may have anywhere.
    used: BTreeSet<Permission>,
}

impl<'a> View<'a> {
    fn new(wish: &'a Wish<'a>, there: &'a SecurityGroupRules, known: &mut Known) -> Self {
        let mut counts = [there.others, there.others];
        for rule in &there.rules {
            counted(&mut counts, &rule.permission.source);
        }
        for (quota, count) in known.quota.iter_mut().zip(counts) {
            // It holds more than we took for the most.
            *quota = quota.filter(|quota| *quota >= count);
        }
        Self {
            wish,
            there,
            present: there.rules.iter().map(|rule| &rule.permission).collect(),
            counts,
            used: union(wish.claims.iter().flat_map(|claim| claim.used(wish.group))),
        }
    }

    /// The rules that should be there, those of the oldest bindings first; and those that open more than was asked for.
    fn wanted(&self, known: &Known) -> (Vec<Permission>, Vec<Permission>) {
        let asked: Vec<(usize, &Permission)> = self
            .wish
            .claims
            .iter()
            .enumerate()
            .flat_map(|(age, claim)| claim.wanted(self.wish.group).map(move |permission| (age, permission)))
            .collect();
        let exact = union(asked.iter().map(|(_, permission)| *permission));
        let ranges = match self.wish.overflow {
            RuleOverflow::Fail => exact.clone(),
            RuleOverflow::Widen => self.widened(exact.clone(), known),
        };
        let widened = ranges.difference(&exact).cloned().collect();
        let mut ranked: Vec<(usize, Permission)> = ranges
            .into_iter()
            .map(|range| {
                let users = asked.iter().filter(|(_, permission)| is_within(permission, &range));
                (users.map(|(age, _)| *age).min().unwrap_or_default(), range)
            })
            .collect();
        ranked.sort();
        (ranked.into_iter().map(|(_, range)| range).collect(), widened)
    }

    /// Merges the closest ranges until all have room, or until there is nothing more to merge.
    fn widened(&self, mut ranges: BTreeSet<Permission>, known: &Known) -> BTreeSet<Permission> {
        while let Some(family) = self.overfull(&ranges, known) {
            let mut by_source: BTreeMap<(RuleProtocol, &Source), Vec<&Permission>> = BTreeMap::new();
            for range in &ranges {
                if families(&range.source).get(family) == Some(&true) {
                    by_source.entry((range.protocol, &range.source)).or_default().push(range);
                }
            }
            let pairs = by_source.values().flat_map(|of_source| {
                of_source.iter().zip(of_source.iter().skip(1)).map(|(low, high)| (*low, *high))
            });
            let closest = pairs.min_by_key(|(low, high)| (high.from_port.saturating_sub(low.to_port), *low));
            let Some((low, high)) = closest.map(|(low, high)| (low.clone(), high.clone())) else { break };
            ranges.remove(&low);
            ranges.remove(&high);
            ranges.insert(Permission { to_port: high.to_port, ..low });
        }
        ranges
    }

    /// The family in which these ranges, beside the rules that stay anyway, are too many.
    fn overfull(&self, ranges: &BTreeSet<Permission>, known: &Known) -> Option<usize> {
        let mut counts = [self.there.others, self.there.others];
        let open: Vec<&Permission> = ranges.iter().collect();
        for rule in &self.there.rules {
            let stays = !self.wish.is_ours(rule)
                || (!ranges.contains(&rule.permission)
                    && self.is_missed(&rule.permission, open.iter().copied()));
            if stays {
                counted(&mut counts, &rule.permission.source);
            }
        }
        let theirs: BTreeSet<&Permission> = self
            .there
            .rules
            .iter()
            .filter(|rule| !self.wish.is_ours(rule))
            .map(|rule| &rule.permission)
            .collect();
        for range in ranges.iter().filter(|range| !theirs.contains(range)) {
            counted(&mut counts, &range.source);
        }
        let mut over = counts.into_iter().zip(known.quota).enumerate();
        over.find(|(_, (count, quota))| quota.is_some_and(|quota| *count > quota)).map(|(family, _)| family)
    }

    /// Tells if a living binding would miss something when only `left` remained of the rules.
    fn is_missed<'b>(&self, gone: &Permission, left: impl Iterator<Item = &'b Permission> + Clone) -> bool {
        let mut parts = self.used.iter().filter_map(|used| common(used, gone));
        parts.any(|part| !is_open(&part, left.clone()))
    }

    /// Rules of ours that may go, all of them at once.
    fn stale<'b>(&'b self, wanted: &'b [Permission]) -> Vec<&'b Rule> {
        let mut left: Vec<&Rule> = self.there.rules.iter().collect();
        let mut found = Vec::new();
        for rule in self.candidates(wanted) {
            let others = left.iter().filter(|other| other.id != rule.id).map(|other| &other.permission);
            if !self.is_missed(&rule.permission, others) {
                left.retain(|other| other.id != rule.id);
                found.push(rule);
            }
        }
        found
    }

    /// Tells if there are such rules of ours whose ids are not known yet.
    fn has_unnumbered(&self, is_meant: impl Fn(&Permission) -> bool) -> bool {
        let mut rules = self.there.rules.iter();
        rules.any(|rule| rule.id.is_empty() && self.wish.is_ours(rule) && is_meant(&rule.permission))
    }

    /// The rules of ours that bindings which were deleted with `on-delete: retain` use.
    fn to_retain(&self, not: &BTreeMap<String, AwsError>) -> Vec<Retained> {
        let mut found: Vec<Retained> = Vec::new();
        for claim in self.wish.claims {
            let Some(description) = &claim.retained_as else { continue };
            let ours = self.there.rules.iter().filter(|rule| self.wish.is_ours(rule));
            for rule in ours.filter(|rule| !not.contains_key(&rule.id)) {
                let is_used =
                    claim.used(self.wish.group).any(|used| common(used, &rule.permission).is_some());
                if is_used && found.iter().all(|known| known.id != rule.id || rule.id.is_empty()) {
                    let (id, permission) = (rule.id.clone(), rule.permission.clone());
                    found.push(Retained { id, permission, description: description.clone() });
                }
            }
        }
        found
    }

    /// Rules of ours that are not wanted as they stand.
    fn candidates<'b>(&'b self, wanted: &'b [Permission]) -> impl Iterator<Item = &'b Rule> {
        self.there.rules.iter().filter(|rule| {
            !rule.id.is_empty() && self.wish.is_ours(rule) && !wanted.contains(&rule.permission)
        })
    }

    /// Makes room for one more rule.
    fn room_for(
        &self,
        permission: &Permission,
        wanted: &[Permission],
        unchangeable: &BTreeSet<String>,
    ) -> Option<Room> {
        let change = |rule: &Rule, loses_nothing| Room {
            step: Step::Modify(rule.id.clone(), permission.clone()),
            loses_nothing,
        };
        let changeable = || self.candidates(wanted).filter(|rule| !unchangeable.contains(&rule.id));
        if let Some(rule) = changeable().find(|rule| is_within(&rule.permission, permission)) {
            return Some(change(rule, true));
        }
        let left = |rule: &Rule| {
            let id = rule.id.clone();
            let others = self.there.rules.iter().filter(move |other| other.id != id);
            others.map(|other| &other.permission)
        };
        let is_alike = |rule: &Rule| match (&rule.permission.source, &permission.source) {
            (Source::SecurityGroup(_), Source::SecurityGroup(_)) => true,
            (one @ Source::Cidr(_), other @ Source::Cidr(_)) => families(one) == families(other),
            _ => false,
        };
        let spare = changeable().filter(|rule| is_alike(rule)).find(|rule| {
            let after = left(rule).chain(std::iter::once(permission));
            !self.is_missed(&rule.permission, after)
        });
        if let Some(rule) = spare {
            return Some(change(rule, false));
        }
        // Another kind of source: one is taken away, the next step adds. Those that make most room go first.
        let wants = families(&permission.source);
        let helps = |rule: &&Rule| {
            let has = families(&rule.permission.source);
            has.into_iter().zip(wants).filter(|(has, wants)| *has && *wants).count()
        };
        let spare = self
            .candidates(wanted)
            .filter(|rule| helps(rule) > 0 && !self.is_missed(&rule.permission, left(rule)))
            .max_by_key(helps)?;
        Some(Room { step: Step::Revoke(vec![spare.id.clone()]), loses_nothing: false })
    }
}

#[cfg(test)]
mod tests;
