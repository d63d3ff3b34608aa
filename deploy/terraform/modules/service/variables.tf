variable "name" {
  description = "Name of the group and prefix of its parts."
  type        = string
}

variable "role" {
  description = "api or worker."
  type        = string

  validation {
    condition     = contains(["api", "worker"], var.role)
    error_message = "role: api or worker."
  }
}

variable "image" {
  description = "The image by digest."
  type        = string
}

variable "nginx_image" {
  description = "NGINX by digest, for role api."
  type        = string
  default     = ""
}

variable "instance_type" {
  description = "An arm64 machine type."
  type        = string
}

variable "minimum" {
  description = "Fewest machines."
  type        = number
}

variable "maximum" {
  description = "Most machines."
  type        = number
}

variable "vpc_id" {
  description = "The network."
  type        = string
}

variable "subnet_ids" {
  description = "Where machines are."
  type        = list(string)
}

variable "public_subnet_ids" {
  description = "Where the balancer is, for role api."
  type        = list(string)
  default     = []
}

variable "service_group" {
  description = "Security group of the machines."
  type        = string
}

variable "balancer_group" {
  description = "Security group of the balancer, for role api."
  type        = string
  default     = ""
}

variable "certificate_arn" {
  description = "Certificate of the balancer, for role api."
  type        = string
  default     = ""
}

variable "log_bucket" {
  description = "Where the balancer writes its log, for role api."
  type        = string
  default     = ""
}

variable "key_arn" {
  description = "KMS key of secret and logs."
  type        = string
}

variable "secret_arn" {
  description = "The one secret that these machines may read."
  type        = string
}

variable "bucket_arn" {
  description = "The bucket of STORAGE_URL."
  type        = string
}

variable "settings" {
  description = "Settings without secrets, by the names of their variables."
  type        = map(string)
}
