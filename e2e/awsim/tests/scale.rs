//! 1,000 target groups of 1,000 targets, over HTTP: what an answer costs, how many come per second on one core, what it
//! needs. Costs are times on a processor, of server and client together, since other tests may have the machine.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may say what it means"
)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use awsim::{Cluster, Options, Server};

const ACCOUNT: &str = "111122223333";

/// A connection that speaks the query protocol.
struct Client(TcpStream);

impl Client {
    fn new(server: &Server) -> Self {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    fn call(&mut self, form: &str) -> (u16, Vec<u8>) {
        let request = format!(
            "POST / HTTP/1.1\r\nHost: x\r\nAuthorization: AWS4-HMAC-SHA256 Credential={ACCOUNT}/20261124/us-west-2/elasticloadbalancing/aws4_request\r\nContent-Length: {}\r\n\r\n{form}",
            form.len()
        );
        self.0.write_all(request.as_bytes()).unwrap();
        let (mut got, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            let n = self.0.read(&mut buffer).unwrap();
            assert!(n > 0, "the connection was closed");
            got.extend_from_slice(&buffer[..n]);
            let Some(end) = got.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&got[..end]).to_ascii_lowercase();
            let length: usize = head
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "))
                .and_then(|l| l.parse().ok())
                .unwrap();
            while got.len() < end + 4 + length {
                let n = self.0.read(&mut buffer).unwrap();
                got.extend_from_slice(&buffer[..n]);
            }
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            return (status, got.split_off(end + 4));
        }
    }
}

/// How long all threads of this process have been on a processor.
fn on_processor() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let of_thread = |thread: std::fs::DirEntry| {
        // a thread may have ended meanwhile
        let text = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|nanoseconds| nanoseconds.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads.map(|thread| of_thread(thread.unwrap())).sum())
}

/// What one of `count` calls costs.
fn cost(count: u32, mut call: impl FnMut()) -> Duration {
    let began = on_processor();
    (0..count).for_each(|_| call());
    (on_processor() - began) / count
}

fn resident_mb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).unwrap_or(0) / 1024
}

#[test]
fn a_million_targets_fit_in_a_gigabyte_and_answers_stay_fast() {
    let mut options = Options::fast();
    options.quotas.targets_per_alb = 1_000_000;
    let server = Server::start(options).unwrap();
    let vpc = Cluster::default().vpc;
    server.seed(ACCOUNT, "us-west-2", |aws| aws.seed_cluster(&Cluster::default()));
    let mut client = Client::new(&server);
    let mut arns = Vec::new();
    for n in 0..1_000 {
        let form = format!(
            "Action=CreateTargetGroup&Version=2015-12-01&Name=g{n}&Protocol=HTTP&Port=80&VpcId={vpc}&TargetType=ip"
        );
        let (status, body) = client.call(&form);
        assert_eq!(status, 200);
        let body = String::from_utf8(body).unwrap();
        let arn = body.split("<TargetGroupArn>").nth(1).unwrap().split('<').next().unwrap();
        arns.push(arn.to_owned());
    }
    let elb = |action: &str, more: &[(&str, &str)]| {
        server.call((ACCOUNT, "TEST"), "us-west-2", awsim::Service::Elb, action, more).unwrap()
    };
    let mut parts = arns.iter().flat_map(|arn| (0..5).map(move |part| (arn, part)));
    let register = cost(5_000, || {
        let (arn, part) = parts.next().unwrap();
        let mut form = format!("Action=RegisterTargets&Version=2015-12-01&TargetGroupArn={arn}");
        for n in 0..200 {
            let at = part * 200 + n;
            form.push_str(&format!(
                "&Targets.member.{}.Id=10.244.{}.{}&Targets.member.{}.Port=8080",
                n + 1,
                at / 250,
                at % 250,
                n + 1
            ));
        }
        assert_eq!(client.call(&form).0, 200);
    });
    // ten load balancers serve fifty groups each, the most that have listeners, so that states are worked out
    let subnets = Cluster::default().subnets;
    for (n, group) in arns.iter().enumerate() {
        let name = format!("lb{}", n / 100);
        let answer = elb(
            "CreateLoadBalancer",
            &[("Name", &name), ("Subnets.member.1", &subnets[0]), ("Subnets.member.2", &subnets[1])],
        );
        let balancer = answer.split("<LoadBalancerArn>").nth(1).unwrap().split('<').next().unwrap();
        let part = format!("{}", 1 + n % 100);
        if n % 100 < 50 {
            elb(
                "CreateListener",
                &[
                    ("LoadBalancerArn", balancer),
                    ("Protocol", "HTTP"),
                    ("Port", &part),
                    ("DefaultActions.member.1.Type", "forward"),
                    ("DefaultActions.member.1.TargetGroupArn", group),
                ],
            );
        }
    }
    let memory = resident_mb();
    let arn = &arns[501];
    let one = format!("Action=DescribeTargetGroups&Version=2015-12-01&TargetGroupArns.member.1={arn}");
    let health = format!("Action=DescribeTargetHealth&Version=2015-12-01&TargetGroupArn={arn}");
    server.advance(None, Duration::from_secs(600));
    let mut call = |form: &str, has: &str| {
        let (status, body) = client.call(form);
        assert!(status == 200 && body.windows(has.len()).any(|part| part == has.as_bytes()));
    };
    call(&health, "<State>healthy</State>");
    let health = cost(500, || call(&health, "10.244.3.249"));
    let began = Instant::now();
    let group = cost(5_000, || call(&one, arn));
    let rate = 1.0 / group.as_secs_f64();
    let beside = 5_000.0 / began.elapsed().as_secs_f64();
    println!(
        "1,000 x 1,000 targets: {memory} MB; on a processor: register 200 {register:?}, one group {group:?} ({rate:.0}/s), \
         health of 1,000 {health:?}; {beside:.0} requests/s on one connection beside what else ran"
    );
    assert!(memory < 1_024, "{memory} MB");
    assert!(rate > 5_000.0, "{rate:.0} requests per second of one core");
    assert!(health < Duration::from_millis(1), "{health:?} for the health of 1,000 targets");
    assert!(register < Duration::from_millis(2), "{register:?} for registering 200 targets");
}
