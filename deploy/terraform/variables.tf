variable "region" {
  description = "AWS region of the primary."
  type        = string
  default     = "us-east-1"
}

variable "zones" {
  description = "Three zones of the region."
  type        = list(string)
  default     = ["us-east-1a", "us-east-1b", "us-east-1c"]
}

variable "environment" {
  description = "Name of this installation, part of every name."
  type        = string
  default     = "production"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,15}$", var.environment))
    error_message = "environment: 2 to 16 lower-case letters, digits and hyphens, starting with a letter."
  }
}

variable "image" {
  description = "The image by digest, such as 123456789012.dkr.ecr.us-east-1.amazonaws.com/scaleout@sha256:…"
  type        = string

  validation {
    condition     = can(regex("@sha256:[0-9a-f]{64}$", var.image))
    error_message = "image: name it by digest (…@sha256:…), so that every machine runs the same."
  }
}

variable "nginx_image" {
  description = "NGINX by digest; the template of deploy/nginx is filled in beside it."
  type        = string
}

variable "hostname" {
  description = "The name that clients use."
  type        = string
}

variable "certificate_arn" {
  description = "ACM certificate of hostname, in this region."
  type        = string
}

variable "payment_url" {
  description = "The payment provider."
  type        = string
}

variable "smtp_url" {
  description = "The mail server, with its password; kept in Secrets Manager."
  type        = string
  sensitive   = true
}

variable "engine" {
  description = "postgres or mysql."
  type        = string
  default     = "postgres"

  validation {
    condition     = contains(["postgres", "mysql"], var.engine)
    error_message = "engine: postgres or mysql."
  }
}

variable "database_class" {
  description = "Instance class of primary and replicas."
  type        = string
  default     = "db.m7g.large"
}

variable "replicas" {
  description = "Read replicas."
  type        = number
  default     = 2
}

variable "cache_node" {
  description = "Node type of both Redis: the one that keeps everything, and the cache."
  type        = string
  default     = "cache.m7g.large"
}

variable "instance_type" {
  description = "Machines of the Auto Scaling groups; an instance of the API uses one core."
  type        = string
  default     = "c7g.large"
}

variable "alarm_email" {
  description = "Who is told when an alarm goes off."
  type        = string
}

variable "admin_networks" {
  description = "Networks whose addresses may administer, such as [\"203.0.113.0/24\"]; none by default."
  type        = list(string)
  default     = []
}

variable "prometheus_group" {
  description = "Security group of a Prometheus in the same network, which may ask every process for its metrics; null for none."
  type        = string
  default     = null
}

variable "traces_endpoint" {
  description = "An OpenTelemetry collector, OTLP over HTTP on 443, such as https://collector.example; traces nothing without."
  type        = string
  default     = ""

  validation {
    condition     = var.traces_endpoint == "" || can(regex("^https://[^/]+$", var.traces_endpoint))
    error_message = "traces_endpoint: https://HOST without a path; machines reach port 443 outside their network, and no other."
  }
}
