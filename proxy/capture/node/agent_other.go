//go:build !linux

package node

import (
	"context"
	"log/slog"

	"github.com/hanse-mesh/hanse/proxy/capture"
)

// Agent is of Linux.
type Agent struct {
	Proc string
	Log  *slog.Logger
}

// Run fails with capture.ErrUnsupported.
func (*Agent) Run(context.Context) error { return capture.ErrUnsupported }
