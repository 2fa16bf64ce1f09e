package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/term"
	"k8s.io/klog/v2"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

func main() {
	klog.SetLogger(logr.Discard()) // client-go tells of each stream that is closed; what matters is in its errors
	os.Exit(mainCode())
}

// mainCode is main, with its deferred functions run before the exit.
func mainCode() int {
	// The first signal ends what runs in an orderly way; after it a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	width := 0
	if w, _, err := term.GetSize(int(os.Stdout.Fd())); err == nil {
		width = w
	}
	c := &cli{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		inTTY: term.IsTerminal(int(os.Stdin.Fd())), outTTY: term.IsTerminal(int(os.Stdout.Fd())), errTTY: term.IsTerminal(int(os.Stderr.Fd())),
		width:  width,
		getenv: os.Getenv, now: time.Now,
		readSecret: func() (string, error) {
			b, err := term.ReadPassword(int(os.Stdin.Fd()))
			return string(b), err
		},
	}
	return c.run(ctx, os.Args[1:])
}

// cli is the world that a command runs in, and the flags that all commands share.
type cli struct {
	in                    io.Reader
	out, err              io.Writer
	inTTY, outTTY, errTTY bool
	width                 int // of the terminal, 0 if unknown
	getenv                func(string) string
	now                   func() time.Time
	readSecret            func() (string, error) // reads a line from the terminal without echo

	// set by flags
	context    string
	socket     string
	kubeconfig string
	output     string
}

// usageError is a wrong command line: exit code 2.
type usageError struct {
	err  error
	hint string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usage(hint, format string, args ...any) error {
	return &usageError{err: fmt.Errorf(format, args...), hint: hint}
}

// errSaid ends a command that has already printed why it fails.
var errSaid = errors.New("failed")

// run executes one command line and returns its exit code.
func (c *cli) run(ctx context.Context, args []string) int {
	root := c.root()
	root.SetArgs(args)
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if errors.Is(err, errSaid) {
		return 1
	}
	p := palette{on: c.errTTY && c.colours()}
	fmt.Fprintf(c.err, "%s %v\n", p.red("error:"), err)
	var wrong *usageError
	if errors.As(err, &wrong) {
		hint := wrong.hint
		if hint == "" {
			hint = cmd.CommandPath() + " --help"
		}
		fmt.Fprintf(c.err, "hint: %s\n", hint)
		return 2
	}
	var e *admin.Error
	if errors.As(err, &e) {
		c.printFaults(e.Faults)
		if e.Hint != "" {
			fmt.Fprintf(c.err, "hint: %s\n", e.Hint)
		}
	} else if errors.Is(err, context.Canceled) {
		fmt.Fprintln(c.err, "hint: it was interrupted; nothing that hansed had not finished remains half done")
	}
	return 1
}

func (c *cli) colours() bool { return c.getenv("NO_COLOR") == "" && c.getenv("TERM") != "dumb" }
