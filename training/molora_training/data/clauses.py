"""Made-up clauses of contracts and judgments, and questions about them that need a sum."""

import random
from dataclasses import dataclass

_NAMES = ("Okafor", "Lindqvist", "Marsh", "Petrenko", "Alvarez", "Haddad", "Nowak", "Ito", "Byrne", "Castellano",
          "Mbeki", "Fraser", "Dubois", "Sandhu", "Keller", "Rossi", "Tran", "Olsen", "Whitaker", "Zhou")  # fmt: skip


@dataclass(frozen=True)
class Worked:
    """A made-up clause, a question about it, its rules each with its sum, and the last line, which has the result."""

    clause: str
    question: str
    steps: tuple[tuple[str, str], ...]
    closing: str
    result: int


def _fee(draw: random.Random) -> Worked:
    who, fee, cut_by = _name(draw), 20 * draw.randint(4, 40), draw.choice((5, 10, 15, 20, 25))
    first, months = (year := draw.choice((6, 12))), draw.randint(14, 30)
    later, lower = months - first, fee * (100 - cut_by) // 100
    what = draw.choice(("licence fee", "service charge", "subscription fee", "monitoring fee"))
    return Worked(
        f"{_head(draw)}The {what} is ${fee} a month and is reduced by {cut_by}% once {year} months have passed.",
        f"What does {who} pay in total over {months} months?",
        (
            (f"For the first {first} months the full {what} is due.", f"{first} * {fee} = {first * fee}"),
            (f"After them the {what} is reduced by {cut_by}%.", f"{fee} * {100 - cut_by} / 100 = {lower}"),
            (f"The reduced {what} is due for the months that remain.",
             f"{months} - {first} = {later} and {later} * {lower} = {later * lower}"),
        ),
        f"In total: {first * fee} + {later * lower} = {first * fee + later * lower}",
        first * fee + later * lower,
    )  # fmt: skip


def _penalty(draw: random.Random) -> Worked:
    grace, daily, late = draw.randint(3, 15), 25 * draw.randint(2, 20), draw.randint(20, 60)
    what = draw.choice(("report", "inventory", "certificate of compliance", "statement of accounts"))
    counted = late - grace
    return Worked(
        f"{_head(draw)}A party that files its {what} late shall pay ${daily} for each day of delay, but nothing "
        f"for the first {grace} days.",
        f"{_name(draw)} files the {what} {late} days late. How many dollars are owed?",
        (
            (f"No penalty accrues during the {grace} days of grace.", f"{late} - {grace} = {counted}"),
            ("Each further day of delay bears the daily penalty.", f"{counted} * {daily} = {counted * daily}"),
        ),
        f"The penalty is ${counted * daily}",
        counted * daily,
    )


def _interest(draw: random.Random) -> Worked:
    sum_due, rate, years = 500 * draw.randint(4, 80), draw.randint(2, 9), draw.randint(2, 7)
    yearly = sum_due * rate // 100
    return Worked(
        f"{_head(draw)}The sum awarded is ${sum_due} and bears simple interest of {rate}% a year until it is paid.",
        f"What must be paid to {_name(draw)} if payment is made after {years} years?",
        (
            (f"Interest of {rate}% runs on the sum awarded alone.", f"{sum_due} * {rate} / 100 = {yearly}"),
            (f"It is owed for all of the {years} years.", f"{years} * {yearly} = {years * yearly}"),
            ("The award itself remains due.", f"{sum_due} + {years * yearly} = {sum_due + years * yearly}"),
        ),
        f"To be paid: ${sum_due + years * yearly}",
        sum_due + years * yearly,
    )


def _deadline(draw: random.Random) -> Worked:
    notice, by_mail, taken = draw.choice((14, 21, 28, 30, 45)), draw.randint(2, 7), draw.randint(50, 90)
    what = draw.choice(("answer", "objection", "notice of appeal", "request for review"))
    allowed = notice + by_mail
    return Worked(
        f"{_head(draw)}An {what} is in time within {notice} days of service; service by mail adds {by_mail} days."
        .replace("An n", "A n").replace("An r", "A r"),
        f"{_name(draw)} was served by mail and filed the {what} {taken} days later. By how many days was it late?",
        (
            ("The period of the clause is longer where service was by mail.", f"{notice} + {by_mail} = {allowed}"),
            ("What was filed after that period is out of time.", f"{taken} - {allowed} = {taken - allowed}"),
        ),
        f"Days late: {taken - allowed}",
        taken - allowed,
    )  # fmt: skip


def _settlement(draw: random.Random) -> Worked:
    members, share = draw.randint(3, 12), draw.choice((20, 25, 30))
    fund = 1000 * members * draw.randint(2, 20)
    fees = fund * share // 100
    return Worked(
        f"{_head(draw)}Of the settlement fund of ${fund}, counsel receives {share}%; the rest is divided equally among "
        f"the {members} plaintiffs.",
        f"How many dollars does {_name(draw)}, one of the plaintiffs, receive?",
        (
            ("Counsel's part is taken from the fund first.", f"{fund} * {share} / 100 = {fees}"),
            ("The remainder belongs to the plaintiffs.", f"{fund} - {fees} = {fund - fees}"),
            ("They take equal parts of it.", f"{fund - fees} / {members} = {(fund - fees) // members}"),
        ),
        f"Each plaintiff receives ${(fund - fees) // members}",
        (fund - fees) // members,
    )


def _credit(draw: random.Random) -> Worked:
    a_year, years, lost = draw.choice((36, 45, 54, 60)), draw.randint(3, 12), draw.randint(5, 30)
    return Worked(
        f"{_head(draw)}A prisoner earns {a_year} days of credit for each full year served, less the days forfeited for "
        "misconduct.",
        f"{_name(draw)} has served {years} full years and forfeited {lost} days. How many days of credit are left?",
        (
            ("Credit is earned for full years alone.", f"{years} * {a_year} = {years * a_year}"),
            ("Forfeited days are taken off.", f"{years * a_year} - {lost} = {years * a_year - lost}"),
        ),
        f"Days of credit: {years * a_year - lost}",
        years * a_year - lost,
    )


def _hours(draw: random.Random) -> Worked:
    hours, rate, less = draw.randint(20, 120), 20 * draw.randint(8, 25), draw.choice((10, 15, 20, 30))
    costs, billed = draw.randint(150, 900), hours * rate
    granted = billed * (100 - less) // 100
    return Worked(
        f"{_head(draw)}The court allows attorney's fees at ${rate} an hour, lowered by {less}% for limited success, "
        "and costs in full.",
        f"Counsel for {_name(draw)} worked {hours} hours and spent ${costs} on costs. What sum is allowed?",
        (
            ("Fees are allowed by the hour.", f"{hours} * {rate} = {billed}"),
            (f"For limited success they are lowered by {less}%.", f"{billed} * {100 - less} / 100 = {granted}"),
            ("Costs are not lowered.", f"{granted} + {costs} = {granted + costs}"),
        ),
        f"Allowed: ${granted + costs}",
        granted + costs,
    )


def _instalments(draw: random.Random) -> Worked:
    monthly, months, down = 50 * draw.randint(2, 12), draw.randint(8, 40), 100 * draw.randint(2, 15)
    owed = monthly * months + down
    return Worked(
        f"{_head(draw)}Restitution of ${owed} shall be paid: ${down} at once, and the rest at ${monthly} a month.",
        f"For how many months does {_name(draw)} pay?",
        (
            ("What is paid at once counts against the whole.", f"{owed} - {down} = {owed - down}"),
            ("The rest is due in equal monthly payments.", f"{owed - down} / {monthly} = {months}"),
        ),
        f"Months: {months}",
        months,
    )


# By what a passage is of: terms that somebody agreed to, or proceedings.
OF_TERMS = (_fee, _penalty, _deadline)
OF_CASES = (_penalty, _interest, _deadline, _settlement, _credit, _hours, _instalments)


def _name(draw: random.Random) -> str:
    title = draw.choice(("Ms", "Mr", "Dr"))
    return f"{title} {draw.choice(_NAMES)}"


def _head(draw: random.Random) -> str:
    number = draw.randint(2, 40)
    return draw.choice(
        (f"Section {number}. ", f"Clause {number}: ", "It is further provided: ", f"({number}) ", "Added: ")
    )
