//! AWS's answers, changed: what the SDK's decoders and our own reading make of them.

use crate::client::{Answer, Aws, Settings};
use crate::elb::TargetGroupQuery;
use crate::limits::{Limit, Limits};
use aws_config::{Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::http::StatusCode;
use aws_smithy_types::body::SdkBody;
use std::sync::{Arc, Mutex, PoisonError};
use tgb_fuzz::{fuzz, words};

/// What comes back next. Further pages are empty.
#[derive(Debug, Clone)]
struct Wire {
    next: Arc<Mutex<Option<Answered>>>,
    fine: StatusCode,
}

type Answered = (StatusCode, Vec<u8>);

impl HttpConnector for Wire {
    fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (status, body) = next.unwrap_or((self.fine, b"<Empty/>".to_vec()));
        HttpConnectorFuture::ready(Ok(HttpResponse::new(status, SdkBody::from(body))))
    }
}

/// An input is a letter for the call, one for the status, and the body.
#[test]
fn fuzz_aws_answers() {
    let wire = Wire { next: Arc::default(), fine: StatusCode::try_from(200).unwrap() };
    let bad = StatusCode::try_from(400).unwrap();
    let connector = SharedHttpConnector::new(wire.clone());
    let credentials = Credentials::new("AKIAEXAMPLE", "secret", None, None, "fuzz");
    let config = SdkConfig::builder()
        .behavior_version(aws_config::BehaviorVersion::latest())
        .region(Region::new("us-west-2"))
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .retry_config(aws_config::retry::RetryConfig::disabled())
        .http_client(http_client_fn(move |_, _| connector.clone()))
        .build();
    let all = Limit { burst: f64::MAX, rate: f64::MAX };
    let limits = Limits {
        elb: all,
        elb_describe: all,
        elb_targets: all,
        ec2_describe: all,
        ec2_change: all,
        sts: all,
    };
    let settings = Settings { vpc_id: Some("vpc-1".to_owned()), limits, ..Settings::default() };
    let aws = Aws::over(config, "us-west-2".to_owned(), settings);
    let seeds: [&[u8]; 11] = [
        b"g2<DescribeTargetGroupsResponse><DescribeTargetGroupsResult><TargetGroups><member><TargetGroupArn>arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/0123456789abcdef</TargetGroupArn><TargetGroupName>web</TargetGroupName><Protocol>HTTP</Protocol><Port>80</Port><VpcId>vpc-1</VpcId><TargetType>ip</TargetType><IpAddressType>ipv4</IpAddressType><HealthCheckPort>traffic-port</HealthCheckPort><LoadBalancerArns><member>arn</member></LoadBalancerArns></member></TargetGroups><NextMarker>x</NextMarker></DescribeTargetGroupsResult></DescribeTargetGroupsResponse>",
        b"t2<DescribeTagsResponse><DescribeTagsResult><TagDescriptions><member><ResourceArn>arn</ResourceArn><Tags><member><Key>a</Key><Value>b</Value></member></Tags></member></TagDescriptions></DescribeTagsResult></DescribeTagsResponse>",
        b"a2<DescribeTargetGroupAttributesResponse><DescribeTargetGroupAttributesResult><Attributes><member><Key>stickiness.enabled</Key><Value>false</Value></member></Attributes></DescribeTargetGroupAttributesResult></DescribeTargetGroupAttributesResponse>",
        b"h2<DescribeTargetHealthResponse><DescribeTargetHealthResult><TargetHealthDescriptions><member><Target><Id>10.0.0.1</Id><Port>8080</Port><AvailabilityZone>all</AvailabilityZone><QuicServerId>0x0123456789abcdef</QuicServerId></Target><HealthCheckPort>80</HealthCheckPort><TargetHealth><State>unhealthy</State><Reason>Target.Timeout</Reason><Description>Request timed out</Description></TargetHealth></member></TargetHealthDescriptions></DescribeTargetHealthResult></DescribeTargetHealthResponse>",
        b"r2<RegisterTargetsResponse><RegisterTargetsResult/></RegisterTargetsResponse>",
        b"r4<ErrorResponse xmlns=\"http://elasticloadbalancing.amazonaws.com/doc/2015-12-01/\"><Error><Type>Sender</Type><Code>TargetGroupNotFound</Code><Message>One or more target groups not found</Message></Error><RequestId>1</RequestId></ErrorResponse>",
        b"s2<DescribeSubnetsResponse><subnetSet><item><subnetId>subnet-1</subnetId><cidrBlock>10.0.0.0/24</cidrBlock><availabilityZone>us-west-2a</availabilityZone><availabilityZoneId>usw2-az1</availabilityZoneId><ipv6CidrBlockAssociationSet><item><ipv6CidrBlock>fd00::/64</ipv6CidrBlock><ipv6CidrBlockState><state>associated</state></ipv6CidrBlockState></item></ipv6CidrBlockAssociationSet></item></subnetSet><nextToken>x</nextToken></DescribeSubnetsResponse>",
        b"n2<DescribeNetworkInterfacesResponse><networkInterfaceSet><item><networkInterfaceId>eni-1</networkInterfaceId><vpcId>vpc-1</vpcId><groupSet><item><groupId>sg-1</groupId></item></groupSet><privateIpAddressesSet><item><privateIpAddress>10.0.0.1</privateIpAddress></item></privateIpAddressesSet><ipv4PrefixSet><item><ipv4Prefix>10.0.0.16/28</ipv4Prefix></item></ipv4PrefixSet><ipv6AddressesSet><item><ipv6Address>fd00::1</ipv6Address></item></ipv6AddressesSet><attachment><instanceId>i-1</instanceId><deviceIndex>0</deviceIndex></attachment></item></networkInterfaceSet></DescribeNetworkInterfacesResponse>",
        b"i2<DescribeInstancesResponse><reservationSet><item><instancesSet><item><instanceId>i-1</instanceId><networkInterfaceSet><item><networkInterfaceId>eni-1</networkInterfaceId><groupSet><item><groupId>sg-1</groupId></item></groupSet><attachment><deviceIndex>0</deviceIndex></attachment></item></networkInterfaceSet></item></instancesSet></item></reservationSet></DescribeInstancesResponse>",
        b"p2<DescribeSecurityGroupRulesResponse><securityGroupRuleSet><item><securityGroupRuleId>sgr-1</securityGroupRuleId><groupId>sg-1</groupId><isEgress>false</isEgress><ipProtocol>tcp</ipProtocol><fromPort>80</fromPort><toPort>90</toPort><cidrIpv4>10.0.0.0/8</cidrIpv4><referencedGroupInfo><groupId>sg-2</groupId></referencedGroupInfo><description>d</description></item></securityGroupRuleSet></DescribeSecurityGroupRulesResponse>",
        b"e4<Response><Errors><Error><Code>InvalidGroup.NotFound</Code><Message>The security group 'sg-1' does not exist</Message></Error></Errors><RequestID>1</RequestID></Response>",
    ];
    let parts = [
        "<member>",
        "</member>",
        "<item>",
        "</item>",
        "<",
        "/>",
        "&lt;",
        "&#x0;",
        "&a;",
        "<![CDATA[",
        "<!--",
        "<?xml?>",
        "-1",
        "65536",
        "99999999999999999999",
        "true",
        "\u{feff}",
        " xmlns=\"",
        "<Code>",
        "<Message>",
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    fuzz("aws-answers", &seeds, &parts, |input| {
        let &[call, status, ref body @ ..] = input else { return (0, String::new()) };
        let status = if status == b'4' { bad } else { wire.fine };
        *wire.next.lock().unwrap() = Some((status, body.to_vec()));
        let done: Answer<usize> = runtime.block_on(async {
            let ids = ["sg-1".to_owned()];
            let group = TargetGroupQuery::Arn("arn");
            match call {
                b'g' => aws.target_groups(None, group).await.map(|found| found.len()),
                b't' => aws.tags(None, "arn").await.map(|found| found.len()),
                b'a' => aws.target_group_attributes(None, "arn").await.map(|found| found.len()),
                b'h' => aws.target_health(None, "arn").await.map(|found| found.len()),
                b'r' => aws.register(None, "arn", &[]).await.map(|()| 0),
                b's' => aws.subnets("vpc-1").await.map(|found| found.len()),
                b'n' => aws.interfaces(&ids).await.map(|found| found.len()),
                b'i' => aws.interfaces_of_instances(&ids).await.map(|found| found.len()),
                b'p' => aws.security_group_rules("sg-1").await.map(|found| found.rules.len() + found.others),
                _ => aws.security_groups(&ids).await.map(|found| found.len()),
            }
        });
        match done {
            Ok(count) => (count.min(3), char::from(call).to_string()),
            Err(error) => (9, words(&error.to_string())),
        }
    });
}
