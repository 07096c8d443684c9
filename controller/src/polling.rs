//! When to look at AWS again. No clock: the time since the last look is the caller's.

use std::time::Duration;

/// Why health is worth an early look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hurry {
    /// Pods wait for their readiness gates, or old targets for healthy new ones.
    Waiting,
    /// Targets are new.
    New,
    /// Nothing is under way.
    Idle,
}

/// The period at which the targets of each of so many bindings are read and compared: at every `--health-poll` and at least at every
/// `--resync`, or less often if together they would exceed `rate` calls per second.
pub(crate) fn period(health_poll: Duration, resync: Duration, bindings: usize, rate: f64) -> Duration {
    let bindings = f64::from(u32::try_from(bindings).unwrap_or(u32::MAX));
    health_poll.min(resync).max(Duration::try_from_secs_f64(bindings / rate).unwrap_or(Duration::MAX))
}

/// After how long to look again, `looks` being how often AWS was asked since it was last changed; `None`: at the next poll.
///
/// The more target groups wait, the more patient each is: together they stay below `rate` calls per second. While that
/// allows it (at 2 per second: up to three of them) each is looked at often enough that a gate opens within 2 s of AWS's
/// word, the call and the write included.
pub(crate) fn next_look(hurry: Hurry, looks: usize, waiting: usize, rate: f64) -> Option<Duration> {
    const WAITING: [u64; 5] = [1, 2, 4, 8, 15];
    const NEW: [u64; 8] = [2, 3, 5, 5, 5, 10, 20, 40];
    let (delays, few): (&[u64], bool) = match hurry {
        Hurry::Waiting => (&WAITING, true),
        Hurry::New => (&NEW, false),
        Hurry::Idle => return None,
    };
    let delay = delays.get(looks).or(delays.last()).copied().map(Duration::from_secs)?;
    if !few {
        return Some(delay);
    }
    let waiting = f64::from(u32::try_from(waiting).unwrap_or(u32::MAX));
    let fair = Duration::try_from_secs_f64(waiting / rate).unwrap_or(delay);
    Some(delay.min(fair.max(Duration::from_secs(1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(hurry: Hurry, waiting: usize) -> Vec<u64> {
        let delay = |looks| next_look(hurry, looks, waiting, 2.0).map_or(0, |delay| delay.as_secs());
        (0..9).map(delay).collect()
    }

    #[test]
    fn many_that_wait_are_looked_at_ever_later_and_few_at_least_every_two_seconds() {
        assert_eq!(looks(Hurry::Waiting, 100), [1, 2, 4, 8, 15, 15, 15, 15, 15]);
        assert_eq!(looks(Hurry::Waiting, 1), [1; 9]);
        assert_eq!(looks(Hurry::Waiting, 10), [1, 2, 4, 5, 5, 5, 5, 5, 5]);
        assert_eq!(looks(Hurry::New, 1), [2, 3, 5, 5, 5, 10, 20, 40, 40]);
        assert_eq!(next_look(Hurry::Idle, 0, 1, 2.0), None);
    }

    #[test]
    fn every_resync_compares_also_where_polls_are_rare_as_far_as_the_rate_allows() {
        let seconds = |poll, resync, bindings| {
            period(Duration::from_secs(poll), Duration::from_secs(resync), bindings, 2.0).as_secs()
        };
        assert_eq!(seconds(60, 600, 100), 60);
        assert_eq!(seconds(3600, 600, 100), 600);
        assert_eq!(seconds(60, 600, 1000), 500);
        assert_eq!(seconds(60, 600, 5000), 2500);
    }

    #[test]
    fn those_that_wait_stay_below_the_rate_together() {
        for waiting in [2, 3, 10, 15, 30] {
            let delay = next_look(Hurry::Waiting, 9, waiting, 2.0).unwrap();
            let per_second = f64::from(u32::try_from(waiting).unwrap()) / delay.as_secs_f64();
            assert!(per_second <= 2.0, "{waiting}: {per_second}");
            // Half a second is left for the call and the write.
            assert!(waiting > 3 || delay <= Duration::from_millis(1_500), "{waiting}: {delay:?}");
        }
    }
}
