# The load balancer, for role api only: TLS ends here, NGINX on each machine does the rest.

resource "aws_lb" "this" {
  # checkov:skip=CKV2_AWS_28:a web application firewall is a subscription of its own; docs/deployment/aws.md says how to add one
  count = local.serves ? 1 : 0

  name                       = substr(var.name, 0, 32)
  load_balancer_type         = "application"
  internal                   = false
  subnets                    = var.public_subnet_ids
  security_groups            = [var.balancer_group]
  drop_invalid_header_fields = true
  enable_deletion_protection = true
  # Above the 60 s in which a stream of events says something at least every 15 s.
  idle_timeout = 75

  access_logs {
    bucket  = var.log_bucket
    prefix  = "balancer"
    enabled = true
  }
}

resource "aws_lb_target_group" "this" {
  # checkov:skip=CKV_AWS_378:within the network, between the balancer's and the machines' security groups only
  count = local.serves ? 1 : 0

  name     = substr(var.name, 0, 32)
  port     = 8080
  protocol = "HTTP"
  vpc_id   = var.vpc_id
  # As long as an instance drains.
  deregistration_delay          = 30
  load_balancing_algorithm_type = "least_outstanding_requests"

  health_check {
    path                = "/health/ready"
    matcher             = "200"
    interval            = 5
    timeout             = 3
    healthy_threshold   = 2
    unhealthy_threshold = 2
  }
}

resource "aws_lb_listener" "https" {
  count = local.serves ? 1 : 0

  load_balancer_arn = aws_lb.this[0].arn
  port              = 443
  protocol          = "HTTPS"
  ssl_policy        = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn   = var.certificate_arn

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.this[0].arn
  }
}

resource "aws_lb_listener" "http" {
  count = local.serves ? 1 : 0

  load_balancer_arn = aws_lb.this[0].arn
  port              = 80
  protocol          = "HTTP"

  default_action {
    type = "redirect"

    redirect {
      protocol    = "HTTPS"
      port        = "443"
      status_code = "HTTP_301"
    }
  }
}
