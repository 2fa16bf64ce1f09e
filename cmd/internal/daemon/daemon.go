package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/hashicorp/go-multierror"
)

// Version is set by the linker.
var Version = "v0.0.0-dev"

// Signals returns a context that ends with the first SIGINT or SIGTERM. A second one ends the process at once, for whoever does not
// want to wait for the drain.
func Signals(parent context.Context, log *slog.Logger) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		for first := true; ; first = false {
			select {
			case sig := <-ch:
				if !first {
					log.Warn("second signal: ending at once", "signal", sig.String())
					os.Exit(1)
				}
				log.Info("ending", "signal", sig.String())
				cancel(fmt.Errorf("signal %s", sig))
			case <-parent.Done():
				signal.Stop(ch)
				return
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// Logger writes JSON lines to w. level may be changed while it is in use.
func Logger(w io.Writer, level *slog.LevelVar) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
}

// ParseLevel reads debug, info, warn or error; "" is info.
func ParseLevel(s string) (slog.Level, error) {
	switch s {
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level %q: want debug, info, warn or error", s)
}

// Group runs functions that live and end together. The zero Group is ready.
type Group struct {
	members []member
}

type member struct {
	name string
	run  func(context.Context) error
}

// Add adds a function that blocks until its context ends. name is for errors and logs.
func (g *Group) Add(name string, run func(context.Context) error) {
	g.members = append(g.members, member{name, run})
}

// Run starts everything, in order, and stops it in reverse order when ctx ends or one function returns: each is told to end, and awaited, before
// the one added before it is told. It returns the errors of all.
func (g *Group) Run(ctx context.Context, log *slog.Logger) error {
	type running struct {
		member
		cancel context.CancelFunc
		done   chan struct{}
	}
	base := context.WithoutCancel(ctx)
	ended := make(chan string, len(g.members))
	var (
		all    []running
		mu     sync.Mutex
		result *multierror.Error // guarded by mu
	)
	for _, m := range g.members {
		runCtx, cancel := context.WithCancel(base)
		r := running{member: m, cancel: cancel, done: make(chan struct{})}
		all = append(all, r)
		go func() {
			defer close(r.done)
			if err := m.run(runCtx); err != nil && !(errors.Is(err, context.Canceled) && runCtx.Err() != nil) {
				mu.Lock()
				result = multierror.Append(result, fmt.Errorf("%s: %w", m.name, err))
				mu.Unlock()
			}
			ended <- m.name
		}()
	}
	select {
	case <-ctx.Done():
	case name := <-ended:
		log.Warn("a part has ended: ending all", "part", name)
	}
	for i := len(all) - 1; i >= 0; i-- {
		all[i].cancel()
		<-all[i].done
	}
	if result != nil {
		result.ErrorFormat = oneLine
	}
	return result.ErrorOrNil()
}

// oneLine joins several errors for a log line.
func oneLine(errs []error) string { return errors.Join(errs...).Error() }
