//go:build linux

package lab

import (
	"context"
	"os/exec"
)

// Host is a machine without Kubernetes: a network of its own beside those of the nodes. Nodes and Pods reach it; it reaches nodes, and no Pod.
type Host struct{ Name, IP string }

// Command is a program to be run in the host's network.
func (h *Host) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + h.Name, program}, args...)...)
}
