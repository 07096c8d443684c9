//! Token buckets in front of AWS, one per class of calls, so that a throttled class never slows another.
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
}

/// Burst and refill of each class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// ELBv2 Describe*: (burst, per second).
    pub elb_describe: (f64, f64),
    /// Register and deregister: (burst, per second).
    pub elb_targets: (f64, f64),
    /// EC2 Describe*: (burst, per second).
    pub ec2_describe: (f64, f64),
    /// Security group changes: (burst, per second).
    pub ec2_change: (f64, f64),
}

impl Default for Limits {
    /// Inside of what AWS grants an account, leaving room for its other users.
    fn default() -> Self {
        Self {
            elb_describe: (30.0, 8.0),
            elb_targets: (20.0, 4.0),
            ec2_describe: (50.0, 10.0),
            ec2_change: (40.0, 5.0),
        }
    }
}

/// One bucket. A call takes a token and waits for it if there is none.
#[derive(Debug)]
pub(crate) struct Bucket {
    burst: f64,
    full_rate: f64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: f64,
    rate: f64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn new((burst, rate): (f64, f64)) -> Self {
        Self { burst, full_rate: rate, state: Mutex::new(State { tokens: burst, rate, at: Instant::now() }) }
    }

    /// Waits for a token. Waiters are served in the order of their arrival, since each takes its token at once and
    /// sleeps off the debt.
    pub(crate) async fn take(&self) {
        let wait = self.reserve(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    fn reserve(&self, now: Instant) -> Duration {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(state.at).as_secs_f64();
        state.tokens = (state.tokens + passed * state.rate).min(self.burst) - 1.0;
        // A rate that AWS made us halve comes back by a tenth of the full one per second.
        state.rate = (state.rate + passed * self.full_rate * 0.1).min(self.full_rate);
        state.at = now;
        if state.tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-state.tokens / state.rate) }
    }

    /// AWS throttled a call of this class: half the rate, and nothing saved up.
    pub(crate) fn throttled(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.rate = (state.rate / 2.0).max(self.full_rate / 64.0);
        state.tokens = state.tokens.min(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_what_follows_waits_for_its_refill() {
        let bucket = Bucket::new((2.0, 4.0));
        let now = Instant::now();
        assert_eq!(bucket.reserve(now), Duration::ZERO);
        assert_eq!(bucket.reserve(now), Duration::ZERO);
        let waits = [bucket.reserve(now), bucket.reserve(now)].map(|wait| wait.as_millis());
        assert!((240..=250).contains(&waits[0]) && (490..=500).contains(&waits[1]), "{waits:?}");
    }

    #[test]
    fn a_throttled_class_slows_down_and_recovers() {
        let bucket = Bucket::new((1.0, 4.0));
        let now = Instant::now();
        assert_eq!(bucket.reserve(now), Duration::ZERO);
        bucket.throttled();
        assert!(bucket.reserve(now) > Duration::from_millis(450));
        let later = now + Duration::from_secs(20);
        assert_eq!(bucket.reserve(later), Duration::ZERO);
        assert!(bucket.reserve(later) < Duration::from_millis(300));
    }
}
