# Machines that run the image: API instances behind a load balancer (role api), or workers, relay and scheduler (role
# worker). 2 to 10 of them, by CPU. A machine that leaves the group finishes its requests first.

data "aws_ssm_parameter" "machine_image" {
  name = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64"
}

data "aws_region" "here" {}

locals {
  serves = var.role == "api"
}

resource "aws_iam_role" "machine" {
  name = var.name
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "ec2.amazonaws.com" }
    }]
  })
}

resource "aws_iam_role_policy_attachment" "managed" {
  for_each = toset(["AmazonSSMManagedInstanceCore", "AmazonEC2ContainerRegistryReadOnly", "CloudWatchAgentServerPolicy"])

  role       = aws_iam_role.machine.name
  policy_arn = "arn:aws:iam::aws:policy/${each.key}"
}

data "aws_iam_policy_document" "machine" {
  statement {
    sid       = "ItsSecret"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [var.secret_arn]
  }

  statement {
    sid       = "ItsKey"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.key_arn]
  }

  statement {
    sid       = "ItsObjects"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${var.bucket_arn}/*"]
  }

  statement {
    sid       = "ToldFromMissing"
    actions   = ["s3:ListBucket"]
    resources = [var.bucket_arn]
  }
}

resource "aws_iam_role_policy" "machine" {
  role   = aws_iam_role.machine.id
  policy = data.aws_iam_policy_document.machine.json
}

resource "aws_iam_instance_profile" "machine" {
  name = var.name
  role = aws_iam_role.machine.name
}

resource "aws_cloudwatch_log_group" "machine" {
  name              = "/${var.name}"
  retention_in_days = 365
  kms_key_id        = var.key_arn
}

resource "aws_launch_template" "this" {
  # checkov:skip=CKV_AWS_341:one hop ends at the machine; our containers take their role for object storage from its metadata
  name_prefix            = "${var.name}-"
  image_id               = data.aws_ssm_parameter.machine_image.value
  instance_type          = var.instance_type
  update_default_version = true

  # gzip, as NGINX's template is in it and the limit is 16 KB; cloud-init unpacks it.
  user_data = base64gzip(templatefile("${path.module}/machine.sh.tftpl", {
    role       = var.role
    image      = var.image
    nginx      = var.nginx_image
    region     = data.aws_region.here.region
    secret     = var.secret_arn
    log_group  = aws_cloudwatch_log_group.machine.name
    settings   = join("\n", [for name, value in var.settings : "${name}=${value}"])
    proxies    = var.settings["TRUSTED_PROXIES"]
    template   = local.serves ? file("${path.module}/../../../nginx/nginx.conf.template") : ""
    registry   = split("/", var.image)[0]
    read_write = "--read-only --cap-drop ALL --security-opt no-new-privileges --tmpfs /tmp:size=16m,mode=1777"
  }))

  iam_instance_profile {
    arn = aws_iam_instance_profile.machine.arn
  }

  network_interfaces {
    associate_public_ip_address = false
    security_groups             = [var.service_group]
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 2
  }

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_size           = 20
      volume_type           = "gp3"
      encrypted             = true
      delete_on_termination = true
    }
  }

  monitoring {
    enabled = true
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = var.name }
  }
}

resource "aws_autoscaling_group" "this" {
  name                      = var.name
  min_size                  = var.minimum
  max_size                  = var.maximum
  vpc_zone_identifier       = var.subnet_ids
  health_check_type         = local.serves ? "ELB" : "EC2"
  health_check_grace_period = 180
  default_instance_warmup   = 120
  target_group_arns         = aws_lb_target_group.this[*].arn

  launch_template {
    id      = aws_launch_template.this.id
    version = aws_launch_template.this.latest_version
  }

  # A new version of the template is a rollout: a machine more first, then one less.
  instance_refresh {
    strategy = "Rolling"

    preferences {
      min_healthy_percentage = 100
      max_healthy_percentage = 125
      auto_rollback          = true
    }
  }

  tag {
    key                 = "Name"
    value               = var.name
    propagate_at_launch = true
  }
}

# Keeps CPU at 60 %: the group follows in both directions, and leaves room for the two minutes that a machine takes.
resource "aws_autoscaling_policy" "track_cpu" {
  name                   = "${var.name}-track-cpu"
  autoscaling_group_name = aws_autoscaling_group.this.name
  policy_type            = "TargetTrackingScaling"

  target_tracking_configuration {
    target_value = 60

    predefined_metric_specification {
      predefined_metric_type = "ASGAverageCPUUtilization"
    }
  }
}

# For a peak that tracking would follow too slowly: the high-CPU alarm (modules/alarms) adds machines at once.
resource "aws_autoscaling_policy" "scale_up" {
  name                   = "${var.name}-scale-up"
  autoscaling_group_name = aws_autoscaling_group.this.name
  policy_type            = "StepScaling"
  adjustment_type        = "ChangeInCapacity"

  step_adjustment {
    scaling_adjustment          = 1
    metric_interval_lower_bound = 0
    metric_interval_upper_bound = 10
  }

  step_adjustment {
    scaling_adjustment          = 3
    metric_interval_lower_bound = 10
  }
}
