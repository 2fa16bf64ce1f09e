// Package echopb is the sample workload's gRPC service.
package echopb
