//! Token buckets in front of AWS: one per class of calls, so that a throttled class never slows another, and one for all
//! ELBv2 calls of an account together. Calls that people wait for go before those that only look.
//!
//! AWS publishes about 40 burst and 10/s for all ELBv2 actions of an account together, and 20 burst and 4/s for
//! RegisterTargets and DeregisterTargets together (Elastic Load Balancing user guide, "API throttling").

use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Calls that share a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallClass {
    /// ELBv2 Describe*.
    ElbDescribe,
    /// RegisterTargets and DeregisterTargets.
    ElbTargets,
    /// EC2 Describe*.
    Ec2Describe,
    /// EC2 security group changes.
    Ec2Change,
    /// STS.
    Sts,
}

impl CallClass {
    /// For metrics.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::ElbDescribe => "elb-describe",
            Self::ElbTargets => "elb-targets",
            Self::Ec2Describe => "ec2-describe",
            Self::Ec2Change => "ec2-change",
            Self::Sts => "sts",
        }
    }

    /// As in the ids of AWS's SDKs.
    pub(crate) const fn service(self) -> &'static str {
        match self {
            Self::ElbDescribe | Self::ElbTargets => "elasticloadbalancing",
            Self::Ec2Describe | Self::Ec2Change => "ec2",
            Self::Sts => "sts",
        }
    }

    /// Whether its calls change something.
    pub(crate) const fn writes(self) -> bool {
        matches!(self, Self::ElbTargets | Self::Ec2Change)
    }
}

/// A bucket's size and how many tokens it gets per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// Calls at once after a rest.
    pub burst: f64,
    /// Calls per second in the long run.
    pub rate: f64,
}

/// The buckets of one account.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// All of ELBv2.
    pub elb: Limit,
    /// ELBv2 Describe*, which draw on [`Self::elb`], too.
    pub elb_describe: Limit,
    /// Register and deregister, which draw on [`Self::elb`], too.
    pub elb_targets: Limit,
    /// EC2 Describe*.
    pub ec2_describe: Limit,
    /// Security group changes.
    pub ec2_change: Limit,
    /// STS: bindings name the roles that are assumed.
    pub sts: Limit,
}

impl Default for Limits {
    /// Inside of what AWS grants an account, leaving room for its other users.
    fn default() -> Self {
        let limit = |burst, rate| Limit { burst, rate };
        Self {
            elb: limit(36.0, 9.0),
            elb_describe: limit(30.0, 8.0),
            elb_targets: limit(20.0, 4.0),
            ec2_describe: limit(50.0, 10.0),
            ec2_change: limit(40.0, 5.0),
            sts: limit(50.0, 10.0),
        }
    }
}

impl Limits {
    /// Takes over one limit, written `NAME=BURST/RATE` as in `elb-targets=20/4`.
    ///
    /// # Errors
    /// A sentence that shows the form and the names.
    pub fn set(&mut self, text: &str) -> Result<(), String> {
        const FORM: &str = "write it as NAME=BURST/RATE with NAME elb, elb-describe, elb-targets, ec2-describe, \
                            ec2-change or sts, as in elb-targets=20/4";
        let read = || {
            let (name, limit) = text.split_once('=')?;
            let (burst, rate) = limit.split_once('/')?;
            let (burst, rate): (f64, f64) = (burst.trim().parse().ok()?, rate.trim().parse().ok()?);
            (burst >= 1.0 && rate > 0.0 && burst.is_finite() && rate.is_finite())
                .then_some((name.trim(), Limit { burst, rate }))
        };
        let Some((name, limit)) = read() else { return Err(format!("{text:?}: {FORM}")) };
        let place = match name {
            "elb" => &mut self.elb,
            "elb-describe" => &mut self.elb_describe,
            "elb-targets" => &mut self.elb_targets,
            "ec2-describe" => &mut self.ec2_describe,
            "ec2-change" => &mut self.ec2_change,
            "sts" => &mut self.sts,
            _ => return Err(format!("{text:?}: {FORM}")),
        };
        *place = limit;
        Ok(())
    }
}

/// The buckets of one account, at work.
#[derive(Debug)]
pub(crate) struct Budget {
    elb: Bucket,
    elb_describe: Bucket,
    elb_targets: Bucket,
    ec2_describe: Bucket,
    ec2_change: Bucket,
    sts: Bucket,
}

impl Budget {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            elb: Bucket::new(limits.elb),
            elb_describe: Bucket::new(limits.elb_describe),
            elb_targets: Bucket::new(limits.elb_targets),
            ec2_describe: Bucket::new(limits.ec2_describe),
            ec2_change: Bucket::new(limits.ec2_change),
            sts: Bucket::new(limits.sts),
        }
    }

    fn bucket(&self, class: CallClass) -> &Bucket {
        match class {
            CallClass::ElbDescribe => &self.elb_describe,
            CallClass::ElbTargets => &self.elb_targets,
            CallClass::Ec2Describe => &self.ec2_describe,
            CallClass::Ec2Change => &self.ec2_change,
            CallClass::Sts => &self.sts,
        }
    }

    /// Waits until a call of this class may go out.
    pub(crate) async fn take(&self, class: CallClass, urgent: bool) {
        let urgent = urgent || class.writes();
        self.bucket(class).take(urgent).await;
        if matches!(class, CallClass::ElbDescribe | CallClass::ElbTargets) {
            self.elb.take(urgent).await;
        }
    }

    /// As [`Self::take`] for a call that writes, if it need not wait.
    pub(crate) fn try_take(&self, class: CallClass) -> bool {
        let now = Instant::now();
        if !self.bucket(class).take_now(now) {
            return false;
        }
        if class == CallClass::ElbTargets && !self.elb.take_now(now) {
            self.elb_targets.give_back();
            return false;
        }
        true
    }

    /// A call of this class that was waited for is not made.
    pub(crate) fn give_back(&self, class: CallClass) {
        self.bucket(class).give_back();
        if matches!(class, CallClass::ElbDescribe | CallClass::ElbTargets) {
            self.elb.give_back();
        }
    }

    /// AWS throttled a call of this class.
    pub(crate) fn throttled(&self, class: CallClass) {
        self.bucket(class).throttled();
    }
}

/// One bucket. A call takes a token and waits for it if there is none; the last quarter is for urgent calls.
#[derive(Debug)]
struct Bucket {
    limit: Limit,
    state: Mutex<State>,
    /// Who waits is served in the order of arrival, urgent calls beside the others.
    urgent: tokio::sync::Mutex<()>,
    patient: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    tokens: f64,
    rate: f64,
    at: Instant,
}

impl Bucket {
    fn new(limit: Limit) -> Self {
        let state = State { tokens: limit.burst, rate: limit.rate, at: Instant::now() };
        Self { limit, state: Mutex::new(state), urgent: Default::default(), patient: Default::default() }
    }

    async fn take(&self, urgent: bool) {
        let turns = if urgent { &self.urgent } else { &self.patient };
        let _turn = turns.lock().await;
        while let Err(wait) = self.try_take(Instant::now(), urgent) {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes a token for an urgent call, if there is one and nobody waits for it.
    fn take_now(&self, now: Instant) -> bool {
        self.urgent.try_lock().is_ok() && self.try_take(now, true).is_ok()
    }

    fn give_back(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tokens = (state.tokens + 1.0).min(self.limit.burst);
    }

    /// Takes a token, or says when there may be one.
    fn try_take(&self, now: Instant, urgent: bool) -> Result<(), Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(state.at).as_secs_f64();
        state.tokens = (state.tokens + passed * state.rate).min(self.limit.burst);
        // A rate that AWS made us halve comes back by a tenth of the full one per second.
        state.rate = (state.rate + passed * self.limit.rate * 0.1).min(self.limit.rate);
        state.at = now;
        let reserve = if urgent { 0.0 } else { (self.limit.burst / 4.0).min(self.limit.burst - 1.0) };
        let missing = 1.0 + reserve - state.tokens;
        if missing > 0.0 {
            return Err(Duration::from_secs_f64(missing / state.rate).max(Duration::from_millis(1)));
        }
        state.tokens -= 1.0;
        Ok(())
    }

    /// AWS throttled a call: half the rate, and nothing saved up.
    fn throttled(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.rate = (state.rate / 2.0).max(self.limit.rate / 64.0);
        state.tokens = state.tokens.min(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(burst: f64, rate: f64) -> Bucket {
        Bucket::new(Limit { burst, rate })
    }

    #[test]
    fn a_burst_is_free_and_what_follows_waits_for_its_refill() {
        let bucket = bucket(2.0, 4.0);
        let now = Instant::now();
        assert_eq!([bucket.try_take(now, true), bucket.try_take(now, true)], [Ok(()), Ok(())]);
        let wait = bucket.try_take(now, true).unwrap_err();
        assert!((249..=251).contains(&wait.as_millis()), "{wait:?}");
        assert_eq!(bucket.try_take(now + wait, true), Ok(()));
    }

    #[test]
    fn the_last_quarter_is_for_urgent_calls() {
        let bucket = bucket(8.0, 1.0);
        let now = Instant::now();
        let polls = (0..8).filter(|_| bucket.try_take(now, false).is_ok()).count();
        let changes = (0..8).filter(|_| bucket.try_take(now, true).is_ok()).count();
        assert_eq!((polls, changes), (6, 2));
    }

    #[tokio::test]
    async fn an_urgent_call_does_not_queue_behind_patient_ones() {
        let bucket = std::sync::Arc::new(bucket(4.0, 1.0));
        for _ in 0..20 {
            let bucket = std::sync::Arc::clone(&bucket);
            tokio::spawn(async move { bucket.take(false).await });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        let begun = Instant::now();
        bucket.take(true).await;
        assert!(begun.elapsed() < Duration::from_millis(500));
    }

    #[test]
    fn what_was_taken_and_is_not_needed_is_there_for_others() {
        let limits = Limits { elb: Limit { burst: 2.0, rate: 0.001 }, ..Limits::default() };
        let budget = Budget::new(&limits);
        let takes = |count: usize| (0..count).filter(|_| budget.try_take(CallClass::ElbTargets)).count();
        assert_eq!(takes(5), 2, "all of ELBv2 is bounded, too");
        budget.give_back(CallClass::ElbTargets);
        assert_eq!(takes(5), 1);
        let now = Instant::now();
        let left = (0..40).filter(|_| budget.elb_targets.try_take(now, true).is_ok()).count();
        assert_eq!(left, 18, "a call that was not made for want of one token gives back the other");
    }

    #[test]
    fn a_throttled_class_slows_down_and_recovers() {
        let bucket = bucket(1.0, 4.0);
        let now = Instant::now();
        assert_eq!(bucket.try_take(now, true), Ok(()));
        bucket.throttled();
        assert!(bucket.try_take(now, true).unwrap_err() > Duration::from_millis(450));
        let later = now + Duration::from_secs(20);
        assert_eq!(bucket.try_take(later, true), Ok(()));
        assert!(bucket.try_take(later, true).unwrap_err() < Duration::from_millis(300));
    }

    #[test]
    fn a_limit_is_written_with_its_name() {
        let mut limits = Limits::default();
        assert_eq!(limits.set("elb-targets=200/40"), Ok(()));
        assert_eq!(limits.elb_targets, Limit { burst: 200.0, rate: 40.0 });
        for wrong in ["", "elb", "elb=1", "elb=0/1", "elb=1/0", "elb=1/x", "iam=1/1"] {
            assert!(limits.set(wrong).is_err(), "{wrong}");
        }
    }
}
